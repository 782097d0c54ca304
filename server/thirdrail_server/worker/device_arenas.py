# SPDX-License-Identifier: Apache-2.0
"""Memory of a session on the device: what its client writes, and what results are written to.

The bounds, the books and the checks are those of memory on the host; what differs is that nothing
here can be looked at, and who uses a piece is known by events and not by references. Results of one
call lie in one piece, which is the slot of the call's place: places count from 1, as slots do.
Nothing of it is ever another session's: it is freed when the session is over.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from thirdrail.errors import InvalidArgument, ResourceExhausted
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES, Device, SharedMemory
from thirdrail_engines.cuda.errors import OutOfDeviceMemory
from thirdrail_server.worker.chunks import Budget, Charge, Made, NewChunk, new_epoch
from thirdrail_server.worker.device_tensors import DeviceBytes
from thirdrail_server.worker.output_room import OutputRoom, Slot, session_has_ended

GRANULARITY_BYTES = 2 << 20  # of chunks: what a GPU maps at once


def _make(device: Device, wanted: int, needed: int) -> Made[SharedMemory]:
    """A chunk of the first size, or of the second one where the device has no more.

    Raises ResourceExhausted, OSError, CudaError, DeviceLost. Takes long: not for the loop.
    """
    try:
        memory = device.share_memory(wanted)
    except OutOfDeviceMemory:
        if needed < wanted:
            return _make(device, needed, needed)
        free = device.memory().free_bytes
        raise ResourceExhausted(
            f"{device.facts.uuid} has no memory for {needed} more bytes of a session: {free} are "
            "free"
        ) from None
    try:
        return Made(memory, memory.nbytes, memory.export())
    except BaseException:
        memory.close()
        raise


class DeviceInput:
    """What lies where is the client's affair. `grow` is called on any thread, one at a time."""

    def __init__(self, device: Device, bytes_max: int, charge: Charge) -> None:
        self.epoch = new_epoch()
        self._device = device
        self._budget = Budget(bytes_max, charge, granularity_bytes=GRANULARITY_BYTES)
        self._chunks: list[SharedMemory] = []

    @property
    def total_bytes(self) -> int:
        """Also after `close`: until it is given back."""
        return self._budget.used_bytes

    def grow(self, size: int) -> NewChunk:
        """Raises ResourceExhausted at a bound, OSError, CudaError, DeviceLost. Takes long."""
        made = self._budget.make(size, functools.partial(_make, self._device))
        if made is None:
            raise ResourceExhausted(
                f"{size} more bytes of input memory on the device were asked for, "
                f"{self.total_bytes} of {self._budget.bytes_max} are in use"
            )
        self._chunks.append(made.memory)
        message = lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_INPUT,
            epoch=self.epoch,
            chunk=len(self._chunks) - 1,
            size=made.nbytes,
        )
        return NewChunk(message, made.fd)

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> DeviceBytes:
        """Raises InvalidArgument for a place outside of the chunks."""
        count = len(self._chunks)
        if ref.chunk >= count:
            raise InvalidArgument(
                f"tensor '{name}' refers to chunk {ref.chunk} of {count} on the device"
            )
        memory = self._chunks[ref.chunk]
        if ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > memory.nbytes:
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} of a "
                f"chunk of {memory.nbytes} on the device; offsets are multiples of "
                f"{ALIGNMENT_BYTES}"
            )
        return DeviceBytes(memory.address + ref.offset, ref.size)

    def close(self) -> None:
        while self._chunks:
            self._chunks.pop().close()


@dataclass(slots=True)
class _Slot(Slot):
    is_taken: bool = False  # also after its release, as long as anything may read or write it


class DeviceOutput(OutputRoom[SharedMemory]):
    """Any thread may lease; the loop does all else."""

    def __init__(self, device: Device, bytes_max: int, charge: Charge, places: int) -> None:
        budget = Budget(bytes_max, charge, granularity_bytes=GRANULARITY_BYTES)
        make = functools.partial(_make, device)
        super().__init__(budget, make, "output memory on the device")
        self._slots = [_Slot() for _ in range(places + 1)]  # slot 0 means "no slot"
        self._left: list[SharedMemory] = []

    def lease(
        self, place: int, sizes: Mapping[str, int]
    ) -> dict[str, tuple[tensor_pb2.ArenaRef, DeviceBytes]]:
        """Room for a call's results, by name: its place's slot, which is not taken.

        Raises ResourceExhausted, CudaError, DeviceLost; Cancelled after `close`.
        """
        rooms = {name: _whole(size) for name, size in sizes.items()}
        total = sum(rooms.values())
        with self._lock:
            if self._is_closed:
                raise session_has_ended()
            slot = self._slots[place]
            assert not slot.is_taken
            found = self._allocator.allocate(total)
            if found is not None:
                slot.chunk, slot.offset = found
                slot.size, slot.is_taken, slot.is_leased = total, True, True
                slot.generation = slot.generation % 0xFFFFFFFF + 1
                return self._parts(place, sizes, rooms)
        self._grow(total)
        return self.lease(place, sizes)

    def _parts(
        self, place: int, sizes: Mapping[str, int], rooms: Mapping[str, int]
    ) -> dict[str, tuple[tensor_pb2.ArenaRef, DeviceBytes]]:
        slot = self._slots[place]
        parts = {}
        offset = slot.offset
        for name, nbytes in sizes.items():
            ref = tensor_pb2.ArenaRef(
                epoch=self.epoch, chunk=slot.chunk, offset=offset, size=nbytes,
                slot=place, generation=slot.generation,
            )  # fmt: skip
            parts[name] = ref, self._at(slot.chunk, offset, nbytes)
            offset += rooms[name]
        return parts

    def _at(self, chunk: int, offset: int, size: int) -> DeviceBytes:
        return DeviceBytes(self._chunks[chunk].address + offset, size)

    def release(self, place: int) -> None:
        """The client refers to the slot no more. It may still read it."""
        self._slots[place].is_leased = False

    def free(self, place: int) -> None:
        """Nothing reads or writes the slot any more. Without a lease nothing happens."""
        with self._lock:
            slot = self._slots[place]
            if slot.is_taken and not self._is_closed:
                slot.is_taken = slot.is_leased = False
                self._allocator.free(slot.chunk, slot.offset)

    def is_leased(self, slot: int, generation: int) -> bool:
        """Just so."""
        return (
            0 < slot < len(self._slots)
            and self._slots[slot].is_leased
            and self._slots[slot].generation == generation
        )

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> DeviceBytes:
        """Raises FailedPrecondition for a slot that is not leased so, InvalidArgument for a place
        outside of it."""
        slot = self._slots[ref.slot] if self.is_leased(ref.slot, ref.generation) else None
        self._checked(name, ref, slot, ALIGNMENT_BYTES)
        return self._at(ref.chunk, ref.offset, ref.size)

    def stop(self) -> None:
        """Lease nothing any more."""
        self._left += super().close()

    def give_back(self) -> None:
        """After `stop`, when the device is done with it."""
        while self._left:
            self._left.pop().close()


def _whole(size: int) -> int:
    """Bytes, a multiple of the alignment and not none."""
    return -(-max(size, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
