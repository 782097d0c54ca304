# SPDX-License-Identifier: Apache-2.0
"""The memory of one lane session as its client meets it: asked for, referred to, given back."""

import asyncio
import contextlib
import functools
import mmap
from collections.abc import Callable, Sequence

from thirdrail.errors import InvalidArgument, ThirdrailError
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.arena_ledger import Account, ArenaLedger, MakingRoom, Owner
from thirdrail_server.worker.chunks import Bytes, MakeChunk, NewChunk
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.session_exports import SessionExports

Unmap = Callable[[Sequence[mmap.mmap]], None]

MAKE_ROOM_S_MAX = 1.0  # for the memory of a session that ended to come back


class SessionMemory:
    """Both arenas, what is exported and imported, and the packets that hand out memory."""

    def __init__(
        self,
        outbox: Outbox,
        limits: LaneLimits,
        ledger: ArenaLedger,
        make_chunk: MakeChunk,
        desk: ExportDesk,
    ) -> None:
        self._outbox = outbox
        self._ledger = ledger
        self._account: Account | None = None
        self.input = InputArena(
            limits.input_arena_bytes_max, self._charge, limits.alone_chunks_max, make_chunk
        )
        self.output = OutputArena(limits.output_arena_bytes_max, self._charge, make_chunk)
        self.exports = SessionExports(desk, self.input, self.output, self._send)
        self._growing: asyncio.Task[None] | None = None
        self._is_closed = False

    def open_account(self, owner: Owner) -> None:
        """From now on the memory counts; without an account it does not."""
        self._account = self._ledger.open(owner)

    def _charge(self, size: int) -> None:
        if self._account is not None:
            self._account.charge(size)

    def charge_shared(self, size: int, *, is_new: bool) -> None:
        """Exported memory is charged to this session from now on, or not any more.

        is_new: it did not exist before; may raise as `charge` does.
        """
        if is_new:
            self._charge(size)
        elif self._account is not None:
            self._account.take_over(size)

    @property
    def total_bytes(self) -> int:
        arenas = self.input.total_bytes + self.output.total_bytes
        return arenas + self.exports.charged_bytes

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to. Raises FailedPrecondition or
        InvalidArgument."""
        if ref.epoch == self.output.epoch:
            return self.output.view(name, ref)
        if ref.epoch == self.input.epoch:
            return self.input.view(name, ref)
        return self.exports.view(name, ref)

    def release(self, lease: lane_pb2.Lease) -> None:
        self.output.release(lease.epoch, lease.slot, lease.generation)

    def grow(self, request: lane_pb2.GrowRequest, unmap: Unmap) -> None:
        """Answer with a chunk, or with why not. Raises InvalidArgument while one is being made.

        unmap: takes mappings that came too late.
        """
        if self._growing is not None:
            raise InvalidArgument("input memory is asked for twice at a time")
        self._growing = asyncio.create_task(self._grow(request, unmap), name="grow")

    async def _grow(self, request: lane_pb2.GrowRequest, unmap: Unmap) -> None:
        try:
            chunk = await self._new_chunk(request)
        except (ThirdrailError, OSError) as error:
            refused = lane_pb2.GrowRefused(size=request.size, message=str(error))
            packet = lane_pb2.LaneResponse(grow_refused=refused).SerializeToString()
            return self._outbox.send(packet)
        finally:
            self._growing = None
        if self._is_closed:
            chunk.close()
            return unmap(self.input.close())
        self._send_chunk(chunk)

    async def _new_chunk(self, request: lane_pb2.GrowRequest) -> NewChunk:
        """Beside the loop: making memory takes long. Where another session ends for it, that is
        waited for."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + MAKE_ROOM_S_MAX
        while True:
            seen = self._ledger.changes
            try:
                grow = functools.partial(self.input.grow, request.size, is_alone=request.alone)
                return await loop.run_in_executor(None, grow)
            except MakingRoom:
                if self._is_closed:
                    raise
                if loop.time() >= ends_s:
                    raise
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ledger.wait_for_change(seen), ends_s - loop.time())

    def send_new_chunks(self) -> None:
        """Before any response that refers to them."""
        if not self.output.has_new_chunks:
            return
        with self._outbox.lock:  # no response gets out between taking them and sending them
            for chunk in self.output.take_new_chunks():
                self._send_chunk(chunk)

    @property
    def has_new_chunks(self) -> bool:
        return self.output.has_new_chunks

    def _send_chunk(self, chunk: NewChunk) -> None:
        packet = lane_pb2.LaneResponse(chunk=chunk.message).SerializeToString()
        self._outbox.send(packet, [chunk.fd])

    def _send(self, message: lane_pb2.LaneResponse, fds: Sequence[int]) -> None:
        self._outbox.send(message.SerializeToString(), fds)

    def close(self) -> list[mmap.mmap]:
        """Take all memory out of use. The mappings are the caller's to unmap, which is possible
        once no run uses them any more."""
        self._is_closed = True
        self.exports.close()
        if self._account is not None:
            self._account.end()
        return [*self.input.close(), *self.output.close()]

    def close_account(self) -> None:
        """The memory is back, except for what others have imported."""
        self.exports.free()
        if self._account is not None:
            self._account.close()
