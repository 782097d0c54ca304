# SPDX-License-Identifier: Apache-2.0
"""The memory of one lane session as its client meets it: asked for, referred to, given back.

Memory on the worker's device is there once the client has asked for a device.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence

from thirdrail.errors import FailedPrecondition, InvalidArgument, ThirdrailError
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.arena_ledger import Account, ArenaLedger, MakingRoom, Owner
from thirdrail_server.worker.chunks import Bytes, MakeChunk, NewChunk
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.janitor import Mapping
from thirdrail_server.worker.lane_device import LaneDevice
from thirdrail_server.worker.output_arena import OutputArena
from thirdrail_server.worker.served_version import OnDeviceLost
from thirdrail_server.worker.session_device import SessionDevice
from thirdrail_server.worker.session_exports import SessionExports

Unmap = Callable[[Sequence[Mapping]], None]

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
        self.device: SessionDevice | None = None
        self._owner: Owner | None = None
        self._device_account: Account | None = None
        self._growing: asyncio.Task[None] | None = None
        self._is_closed = False

    def open_account(self, owner: Owner) -> None:
        """From now on the memory counts; without an account it does not."""
        self._account = self._ledger.open(owner)
        self._owner = owner

    def _charge(self, size: int, /, *, is_spare: bool = False) -> None:
        if self._account is not None:
            self._account.charge(size, is_spare=is_spare)

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

    def release(self, lease: lane_pb2.Lease) -> bool:
        """Whether it was memory on the device."""
        if self.device is not None and self.device.release(lease):
            return True
        self.output.release(lease.epoch, lease.slot, lease.generation)
        return False

    # On the device

    async def attach_device(self, device: LaneDevice, uuid: str, uid: int) -> SessionDevice | None:
        """Beside the loop: it can take long. None: the session has ended meanwhile.

        Raises FailedPrecondition, InvalidArgument, EngineError, DeviceLost.
        """
        if self.device is not None or self._device_account is not None:
            raise FailedPrecondition("this session has, or has asked for, a device already")
        account = None
        if self._owner is not None:
            account = self._device_account = device.ledger.open(self._owner)
        loop = asyncio.get_running_loop()
        try:
            attached = await loop.run_in_executor(None, device.attach, uuid, uid, account)
        except BaseException:
            self._close_device_account()
            raise
        if self._is_closed:
            attached.stop()
            attached.close()
            self._close_device_account()
            return None
        self.device = attached
        return attached

    def send_new_device_chunks(self) -> None:
        """Before any response that refers to them."""
        assert self.device is not None
        for chunk in self.device.output.take_new_chunks():
            self._send_chunk(chunk)

    @property
    def device_bytes(self) -> int:
        return 0 if self.device is None else self.device.total_bytes

    def _close_device_account(self) -> None:
        account, self._device_account = self._device_account, None
        if account is not None:
            account.close()

    def grow(
        self, request: lane_pb2.GrowRequest, unmap: Unmap, on_device_lost: OnDeviceLost
    ) -> None:
        """Answer with a chunk, or with why not. Raises InvalidArgument while one is being made.

        unmap: takes mappings that came too late.
        on_device_lost: told in place of the client, that the process is to end.
        """
        if self._growing is not None:
            raise InvalidArgument("input memory is asked for twice at a time")
        growing = self._grow(request, unmap, on_device_lost)
        self._growing = asyncio.create_task(growing, name="grow")

    async def _grow(
        self, request: lane_pb2.GrowRequest, unmap: Unmap, on_device_lost: OnDeviceLost
    ) -> None:
        try:
            chunk = await self._new_chunk(request)
        except DeviceLost as error:
            return on_device_lost(error)
        except OSError as error:
            return self._refuse(request, f"the worker can make no memory: {error.strerror}")
        except (ThirdrailError, EngineError) as error:
            return self._refuse(request, str(error))
        finally:
            self._growing = None
            if self._is_closed:
                unmap([*self.input.close(), *self._take_device()])
        if self._is_closed:
            return chunk.close()
        self._send_chunk(chunk)

    def _refuse(self, request: lane_pb2.GrowRequest, why: str) -> None:
        refused = lane_pb2.GrowRefused(size=request.size, message=why)
        self._outbox.send(lane_pb2.LaneResponse(grow_refused=refused).SerializeToString())

    async def _new_chunk(self, request: lane_pb2.GrowRequest) -> NewChunk:
        """Beside the loop: making memory takes long. Where another session ends for it, that is
        waited for."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + MAKE_ROOM_S_MAX
        ledger = self._ledger
        grow = functools.partial(self.input.grow, request.size, is_alone=request.alone)
        if request.on_device:
            if self.device is None or request.alone:
                raise InvalidArgument(
                    "memory on a device is for a session that has one, and never for one tensor "
                    "alone"
                )
            ledger = self._device_account.ledger if self._device_account else ledger
            grow = functools.partial(self.device.input.grow, request.size)
        while True:
            seen = ledger.changes
            try:
                return await loop.run_in_executor(None, grow)
            except MakingRoom:
                if self._is_closed:
                    raise
                if loop.time() >= ends_s:
                    raise
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ledger.wait_for_change(seen), ends_s - loop.time())

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

    def close(self) -> list[Mapping]:
        """Take all memory out of use. The mappings are the caller's to unmap, which is possible
        once no run uses them any more."""
        self._is_closed = True
        self.exports.close()
        for account in (self._account, self._device_account):
            if account is not None:
                account.end()
        if self.device is not None:
            self.device.stop()
        device = self._take_device() if self._growing is None else []
        return [*self.input.close(), *self.output.close(), *device]

    def _take_device(self) -> list[SessionDevice]:
        device, self.device = self.device, None
        return [] if device is None else [device]

    def close_account(self) -> None:
        """The memory is back, except for what others have imported."""
        self.exports.free()
        if self._account is not None:
            self._account.close()
        self._close_device_account()
