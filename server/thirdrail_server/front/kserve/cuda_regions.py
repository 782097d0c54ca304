# SPDX-License-Identifier: Apache-2.0
"""Clients' memory on a device, which the worker of that device has open, and we never.

A client hands over 64 bytes that name what it allocated (cuIpcGetMemHandle). The front gives each
region a number and has the worker map it; requests refer to the number, and the worker copies. A
worker that was restarted is told again, before the first request that needs it.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Protocol

from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError
from thirdrail.v1 import tensor_pb2
from thirdrail_server.control_channel import Fields

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class RegionWorker(Protocol):
    """The worker of a device: see Supervisor."""

    name: str
    restarts: int

    async def call(self, do: str, fields: Fields | None = None) -> Fields: ...


@dataclass(slots=True, eq=False)
class CudaRegion:
    """`size` bytes on a device. number: what the worker calls it; none is used twice."""

    name: str
    number: int
    device_id: int
    size: int
    handle: bytes
    worker: RegionWorker
    requests: int = 0  # in flight, that use it
    is_leaving: bool = False  # unregistered, but in use
    is_open: bool = False  # it was, once
    _opened_in: int = -1  # which of the worker's lives
    _opening: asyncio.Task[None] | None = None  # the last
    _closings: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> None:
        """Have the worker map it, if this one has not yet. Raises what the worker says.

        What a worker was asked it does, so that goes on when the caller is cancelled.
        """
        if self._opened_in == self.worker.restarts:
            return
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open(), name=f"open region {self.number}")
            self._opening.add_done_callback(_seen)
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        life = self.worker.restarts
        fields = {"number": self.number, "handle": self.handle.hex(), "size": self.size}
        await self.worker.call("open region", fields)
        self._opened_in, self.is_open = life, True

    async def open_again(self) -> None:
        """The same for a request. Raises InvalidArgument where the memory is gone meanwhile."""
        if self._opened_in == self.worker.restarts:
            return
        try:
            await self.open()
        except (InvalidArgument, NotFound) as error:
            raise InvalidArgument(
                f"shared memory region '{self.name}' cannot be opened by the worker that was "
                f"started again: {error.message}. Register it again"
            ) from None

    def close(self) -> None:
        """The worker lets go of it, soon."""
        if self._opening is not None:
            closing = asyncio.create_task(
                self._close(self._opening), name=f"close region {self.number}"
            )
            self._closings.add(closing)  # the loop's own references are weak
            closing.add_done_callback(self._closings.discard)

    async def _close(self, opening: asyncio.Task[None]) -> None:
        await asyncio.wait((opening,))
        if self._opened_in == self.worker.restarts:
            # Where the worker is gone, so is what it had open.
            with contextlib.suppress(ThirdrailError):
                await self.worker.call("close region", {"number": self.number})


def _seen(opening: asyncio.Task[None]) -> None:
    """How it ended is of no more interest where nobody waits for it."""
    if not opening.cancelled():
        opening.exception()


@dataclass(frozen=True, slots=True)
class CudaPart:
    """The bytes of one tensor in a region; `offset` counts from the region's beginning."""

    region: CudaRegion
    offset: int
    size: int

    @property
    def ref(self) -> tensor_pb2.RegionRef:
        return tensor_pb2.RegionRef(region=self.region.number, offset=self.offset, size=self.size)


def check_cuda(name: str, handle: bytes, device_id: int, devices: int) -> None:
    """Raises InvalidArgument. devices: how many there are."""
    if not devices:
        raise no_device(name)
    if not 0 <= device_id < devices:
        raise bad_arguments(name, f"device_id {device_id}, expected 0 to {devices - 1}")
    if len(handle) != HANDLE_BYTES:
        raise bad_arguments(
            name, f"its raw_handle has {len(handle)} bytes, expected {HANDLE_BYTES}"
        )


def bad_arguments(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"failed to register shared memory region: invalid args: region '{name}': {why}"
    )


def no_device(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"failed to register CUDA shared memory region: '{name}', GPUs not supported"
    )
