# SPDX-License-Identifier: Apache-2.0
"""Pings of one session: an answer at once, or a copy of the client's bytes, to measure what memory
does. No model is involved.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from thirdrail.errors import ResourceExhausted, ThirdrailError
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import Bytes
from thirdrail_server.worker.session_memory import SessionMemory

# A copy of this size takes about 20 us; handing a larger one to a thread takes 100.
COPY_ON_LOOP_BYTES_MAX = 128 << 10


class Pings:
    """send: to the client, after the chunks that the message refers to."""

    def __init__(
        self, memory: SessionMemory, send: Callable[[lane_pb2.LaneResponse], None]
    ) -> None:
        self._memory = memory
        self._send = send
        self._copying: asyncio.Future[None] | None = None  # beside the loop: one at a time

    def answer(self, ping: lane_pb2.Ping) -> None:
        """Now, or when the copy is made."""
        if not ping.HasField("ref"):
            return self._pong(ping, None)
        try:
            source = self._memory.view("ping", ping.ref)
            if source.nbytes > COPY_ON_LOOP_BYTES_MAX:
                return self._copy_beside_loop(ping, source)
            slot, target = self._memory.output.lease(source.nbytes)
        except ThirdrailError as error:
            return self._refuse(ping, error)
        np.copyto(target, source)
        self._pong(ping, slot)

    def _copy_beside_loop(self, ping: lane_pb2.Ping, source: Bytes) -> None:
        if self._copying is not None:
            raise ResourceExhausted("another ping of this session is being copied")
        slot, target = self._memory.output.lease(source.nbytes)
        loop = asyncio.get_running_loop()
        self._copying = loop.run_in_executor(None, np.copyto, target, source)
        self._copying.add_done_callback(lambda _: self._on_copied(ping, slot))

    def _on_copied(self, ping: lane_pb2.Ping, slot: tensor_pb2.ArenaRef) -> None:
        self._copying = None
        self._pong(ping, slot)

    def _pong(self, ping: lane_pb2.Ping, slot: tensor_pb2.ArenaRef | None) -> None:
        self._memory.send_new_chunks()
        pong = lane_pb2.Pong(request=ping.request, ref=slot)
        self._send(lane_pb2.LaneResponse(pong=pong))

    def _refuse(self, ping: lane_pb2.Ping, error: ThirdrailError) -> None:
        status = inference_pb2.Status(reason=error.reason, message=error.message)
        pong = lane_pb2.Pong(request=ping.request, status=status)
        self._send(lane_pb2.LaneResponse(pong=pong))
