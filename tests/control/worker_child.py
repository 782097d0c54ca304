# SPDX-License-Identifier: Apache-2.0
"""A worker process without engines: its models are files that say what loading them does."""

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import Callable

from thirdrail.errors import NotFound
from thirdrail.v1 import metrics_pb2
from thirdrail_engines.engine import ModelFileError
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.control_messages import (
    LoadCommand,
    LoadedModel,
    LoadProgress,
    Resident,
    VersionEngine,
    WorkerMemory,
)
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.worker.control import serve_control
from thirdrail_server.worker.memory import ModelTooLarge

# How often a model of this name is in use when it is to be evicted.
REFUSED_EVICTIONS = {"used_once": 1, "used_always": 1000}


class Models:
    """What `load` finds in a model file decides what happens.

    "held" waits for a file `go` beside it.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.loads = self.evictions = 0

    async def load(
        self, command: LoadCommand, progress: Callable[[LoadProgress], None]
    ) -> LoadedModel:
        name, versions = command.name, command.versions
        self.loads += 1
        is_stopgap = False
        for _version, path in versions:
            # From another thread, as an engine's loader does.
            await asyncio.to_thread(progress, LoadProgress("building", 1, 2))
            words = path.read_text().strip().partition(" ")[0]
            is_stopgap = words == "stopgap" and command.takes_stopgap
            while words == "held" and not path.with_name("go").exists():
                await asyncio.sleep(0.01)
            await _obey("forever" if words == "stopgap" and not is_stopgap else words)
        self.names.add(name)
        self.sizes[name] = sum(path.stat().st_size for _version, path in versions)
        complete = ModelConfig(name=name, max_batch_size=4)
        complete.MergeFrom(command.config or ModelConfig())
        return LoadedModel(
            complete,
            {version: None for version, _path in versions},
            {version: ["x"] for version, _path in versions},
            ["a field has no effect"],
            {version: _engine(is_stopgap=is_stopgap) for version, _path in versions},
        )

    def cancel_loads(self, name: str | None) -> None:
        pass

    async def unload(self, name: str) -> None:
        if name not in self.names:
            raise NotFound(f"no '{name}'")
        self.names.discard(name)

    async def evict(self, name: str) -> bool:
        self.evictions += 1
        if self.evictions <= REFUSED_EVICTIONS.get(name, 0):
            return False
        await self.unload(name)
        return True

    def memory(self) -> WorkerMemory:
        return WorkerMemory([Resident(name, self.sizes[name], 0) for name in sorted(self.names)], 0)

    def counters(self) -> list[metrics_pb2.ModelCounters]:
        return [
            metrics_pb2.ModelCounters(name=name, version=1, requests_ok=self.loads)
            for name in sorted(self.names)
        ]


def _engine(*, is_stopgap: bool) -> VersionEngine:
    reason = "something: compiling" if is_stopgap else ""
    return VersionEngine("nothing", reason, is_stopgap=is_stopgap)


async def _obey(words: str) -> None:
    if words == "bad":
        raise ModelFileError("the file is damaged")
    if words == "bug":
        raise ZeroDivisionError("a secret")
    if words == "odd":
        raise ModelTooLarge("very")  # type: ignore[arg-type]  # what the front cannot read
    if words == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if words == "slow":
        await asyncio.sleep(0.2)
    if words == "forever":
        await asyncio.sleep(3600)


def _status() -> metrics_pb2.WorkerStatus:
    return metrics_pb2.WorkerStatus(resident_bytes=12345, sessions=1)


async def main(control_fd: int) -> None:
    front_is_gone = asyncio.Event()
    channel = await serve_control(
        socket.socket(fileno=control_fd), Models(), _status, front_is_gone.set, ChannelLimits()
    )
    await front_is_gone.wait()
    await channel.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--lane-fd", type=int, required=True)
    parser.add_argument("--behave", default="")
    args = parser.parse_args()
    if args.behave == "exit":
        raise SystemExit(3)
    if args.behave == "deaf":
        signal.pause()
    asyncio.run(main(args.control_fd))
