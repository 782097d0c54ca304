# SPDX-License-Identifier: Apache-2.0
"""The worker's end of the control channel: does what the front asks with the worker's models."""

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from thirdrail.errors import Internal
from thirdrail.v1 import metrics_pb2, sessions_pb2
from thirdrail_engines.engine import ModelFileError
from thirdrail_server.control_channel import (
    ChannelLimits,
    ControlChannel,
    Fields,
    OnProgress,
    open_channel,
)
from thirdrail_server.control_messages import (
    LoadCommand,
    LoadedModel,
    LoadProgress,
    OpenedSession,
    WorkerMemory,
    message_to_text,
)
from thirdrail_server.worker.memory import ModelTooLarge

TellProgress = Callable[[LoadProgress], None]


class Models(Protocol):
    """The worker's models as the front controls them."""

    async def load(self, command: LoadCommand, progress: TellProgress) -> LoadedModel: ...

    def cancel_loads(self, name: str | None) -> None: ...

    async def unload(self, name: str) -> None: ...

    async def evict(self, name: str) -> bool: ...

    def memory(self) -> WorkerMemory: ...

    def counters(self) -> list[metrics_pb2.ModelCounters]: ...


class Sessions(Protocol):
    """The worker's sessions as the front asks about them."""

    def open(self) -> OpenedSession: ...

    async def stop(self, drain_s_max: float) -> None: ...

    async def open_region(self, number: int, handle: bytes, size: int) -> None: ...

    async def close_region(self, number: int) -> None: ...

    def infos(self) -> list[sessions_pb2.SessionInfo]: ...


@dataclass(frozen=True, slots=True)
class _Desk:
    """Answers the front's calls, one method each."""

    models: Models
    sessions: Sessions | None
    status: Callable[[], metrics_pb2.WorkerStatus]

    async def serve(self, do: str, fields: Fields, on_progress: OnProgress) -> Fields:
        match do:
            case "load":
                return await self._load(LoadCommand.from_fields(fields), on_progress)
            case "unload":
                await self.models.unload(str(fields["name"]))
                return {}
            case "cancel loads":
                name = fields.get("name")
                self.models.cancel_loads(None if name is None else str(name))
                return {}
            case "evict":
                return {"evicted": await self.models.evict(str(fields["name"]))}
            case "memory":
                return self.models.memory().to_fields()
            case "counters":
                return {"models": [message_to_text(each) for each in self.models.counters()]}
            case "status":
                return {"status": message_to_text(self.status())}
        return await self._serve_sessions(do, fields)

    async def _serve_sessions(self, do: str, fields: Fields) -> Fields:
        match do:
            case "open session" if self.sessions is not None:
                return self.sessions.open().to_fields()
            case "list sessions" if self.sessions is not None:
                return {"sessions": [message_to_text(each) for each in self.sessions.infos()]}
            case "stop sessions" if self.sessions is not None:
                await self.sessions.stop(float(fields["drain_s_max"]))
                return {}
            case "open region" if self.sessions is not None:
                number, size = int(fields["number"]), int(fields["size"])
                await self.sessions.open_region(number, bytes.fromhex(fields["handle"]), size)
                return {}
            case "close region" if self.sessions is not None:
                await self.sessions.close_region(int(fields["number"]))
                return {}
        raise Internal(f"the worker does not do '{do}'")

    async def _load(self, command: LoadCommand, on_progress: OnProgress) -> Fields:
        tell = _on_this_loop(lambda progress: on_progress(progress.to_fields()))
        try:
            loaded = await self.models.load(command, tell)
        except ModelTooLarge as error:
            return {"too_large_bytes": error.size}
        except ModelFileError as error:
            raise Internal(str(error)) from None
        return loaded.to_fields()


def _on_this_loop(tell: TellProgress) -> TellProgress:
    """Progress may be told by the thread that builds the engine; the channel lives on the loop."""
    loop, thread = asyncio.get_running_loop(), threading.get_ident()

    def tell_from_anywhere(progress: LoadProgress) -> None:
        if threading.get_ident() == thread:
            tell(progress)
        else:
            loop.call_soon_threadsafe(tell, progress)

    return tell_from_anywhere


async def serve_control(
    sock: socket.socket,
    models: Models,
    status: Callable[[], metrics_pb2.WorkerStatus],
    on_front_gone: Callable[[], None],
    limits: ChannelLimits,
    sessions: Sessions | None = None,
) -> ControlChannel:
    """Answer the front on `sock` from now on.

    status: resident memory, sessions and arena bytes of this process; the front fills in the rest.
    sessions: None for a worker that nobody attaches to.
    on_front_gone: called once when the front is gone. The worker then exits at once: whoever it was
        working for went with the front.
    """
    desk = _Desk(models, sessions, status)
    return await open_channel(sock, limits, serve=desk.serve, on_close=on_front_gone)
