# SPDX-License-Identifier: Apache-2.0
"""The memory of one lane session as its client meets it: asked for, referred to, given back."""

import asyncio
import mmap
from collections.abc import Callable

from thirdrail.errors import InvalidArgument, ThirdrailError
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.chunks import Bytes, NewChunk
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.output_arena import OutputArena


class SessionMemory:
    """Both arenas, and the packets that hand out their chunks."""

    def __init__(self, outbox: Outbox, limits: LaneLimits) -> None:
        self._outbox = outbox
        self.input = InputArena(limits.input_arena_bytes_max)
        self.output = OutputArena(limits.output_arena_bytes_max)
        self._is_growing = False
        self._is_closed = False

    @property
    def total_bytes(self) -> int:
        return self.input.total_bytes + self.output.total_bytes

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to. Raises FailedPrecondition or
        InvalidArgument."""
        if ref.epoch == self.output.epoch:
            return self.output.view(name, ref)
        return self.input.view(name, ref)

    def release(self, lease: lane_pb2.Lease) -> None:
        self.output.release(lease.epoch, lease.slot, lease.generation)

    def grow(self, request: lane_pb2.GrowRequest, let_go: Callable[[mmap.mmap], None]) -> None:
        """Answer with a chunk, or with why not. Raises InvalidArgument while one is being made.

        let_go: takes the chunk's mapping if the session has ended meanwhile.
        """
        if self._is_growing:
            raise InvalidArgument("input memory is asked for twice at a time")
        self._is_growing = True
        loop = asyncio.get_running_loop()
        growing = loop.run_in_executor(None, self.input.grow, request.size)
        growing.add_done_callback(lambda done: self._on_grown(request.size, done, let_go))

    def _on_grown(
        self,
        size: int,
        growing: "asyncio.Future[NewChunk]",
        let_go: Callable[[mmap.mmap], None],
    ) -> None:
        self._is_growing = False
        try:
            chunk = growing.result()
        except (ThirdrailError, OSError) as error:
            refused = lane_pb2.GrowRefused(size=size, message=str(error))
            response = lane_pb2.LaneResponse(grow_refused=refused)
            return self._outbox.send(response.SerializeToString())
        if self._is_closed:
            chunk.close()
            for mapping in self.input.close():
                let_go(mapping)
            return None
        self._send_chunk(chunk)

    def send_new_chunks(self) -> None:
        """Before any response that refers to them."""
        for chunk in self.output.take_new_chunks():
            self._send_chunk(chunk)

    def _send_chunk(self, chunk: NewChunk) -> None:
        packet = lane_pb2.LaneResponse(chunk=chunk.message).SerializeToString()
        self._outbox.send(packet, [chunk.fd])

    def close(self) -> list[mmap.mmap]:
        """Take all memory out of use. The mappings are the caller's to unmap, which is possible
        once no run uses them any more."""
        self._is_closed = True
        return [*self.input.close(), *self.output.close()]
