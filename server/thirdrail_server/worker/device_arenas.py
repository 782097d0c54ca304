# SPDX-License-Identifier: Apache-2.0
"""Memory of a session on the device: what its client writes, and what results are written to.

The bounds, the books and the checks are those of memory on the host; what differs is that nothing
here can be looked at, and who uses a piece is known by events and not by references. Results of one
call lie in one piece, which is the slot of the call's place: places count from 1, as slots do.
Nothing of it is ever another session's: it is freed when the session is over.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from thirdrail.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ArenaAllocator
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES, Device, SharedMemory
from thirdrail_engines.cuda.errors import OutOfDeviceMemory
from thirdrail_server.worker.chunks import Charge, NewChunk, charged_chunk_bytes, new_epoch
from thirdrail_server.worker.device_tensors import DeviceBytes

GRANULARITY_BYTES = 2 << 20  # of chunks: what a GPU maps at once


class _Chunks:
    """An arena's memory, piece by piece."""

    def __init__(
        self, device: Device, role: lane_pb2.ArenaRole.ValueType, bytes_max: int, charge: Charge
    ):
        self.epoch = new_epoch()
        self.total_bytes = 0  # also after `close`: until it is freed
        self.all: list[SharedMemory] = []
        self._device = device
        self._role = role
        self._bytes_max = bytes_max
        self._charge = charge

    def grow(self, size: int) -> NewChunk | None:
        """One more with room for `size` bytes; None where that does not fit the arena.

        Raises ResourceExhausted, CudaError, DeviceLost. Takes long: not for the loop.
        """
        chunk_bytes = charged_chunk_bytes(
            size, self.total_bytes, self._bytes_max, self._charge, GRANULARITY_BYTES
        )
        if chunk_bytes is None:
            return None
        needed = _whole(size, GRANULARITY_BYTES)
        try:
            memory = self._make(chunk_bytes, needed)
        except BaseException:
            self._charge(-chunk_bytes)
            raise
        if memory.nbytes < chunk_bytes:
            self._charge(memory.nbytes - chunk_bytes)
            chunk_bytes = memory.nbytes
        self.all.append(memory)
        self.total_bytes += chunk_bytes
        message = lane_pb2.Chunk(
            role=self._role, epoch=self.epoch, chunk=len(self.all) - 1, size=memory.nbytes
        )
        return NewChunk(message, memory.export())

    def _make(self, wanted: int, needed: int) -> SharedMemory:
        """Of the first size, or of the second one where the device has no more."""
        try:
            return self._device.share_memory(wanted)
        except OutOfDeviceMemory:
            if needed < wanted:
                return self._make(needed, needed)
        free = self._device.memory().free_bytes
        raise ResourceExhausted(
            f"{self._device.facts.uuid} has no memory for {needed} more bytes of a session: {free} "
            "are free"
        )

    def at(self, chunk: int, offset: int, size: int) -> DeviceBytes:
        return DeviceBytes(self.all[chunk].address + offset, size)

    def close(self) -> None:
        while self.all:
            self.all.pop().close()


class DeviceInput:
    """What lies where is the client's affair. `grow` is called on any thread, one at a time."""

    def __init__(self, device: Device, bytes_max: int, charge: Charge) -> None:
        self._chunks = _Chunks(device, lane_pb2.ARENA_ROLE_INPUT, bytes_max, charge)
        self._bytes_max = bytes_max
        self.epoch = self._chunks.epoch

    @property
    def total_bytes(self) -> int:
        return self._chunks.total_bytes

    def grow(self, size: int) -> NewChunk:
        """Raises ResourceExhausted at a bound, CudaError, DeviceLost."""
        chunk = self._chunks.grow(size)
        if chunk is None:
            raise ResourceExhausted(
                f"{size} more bytes of input memory on the device were asked for, "
                f"{self.total_bytes} of {self._bytes_max} are in use"
            )
        return chunk

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> DeviceBytes:
        """Raises InvalidArgument for a place outside of the chunks."""
        count = len(self._chunks.all)
        if ref.chunk >= count:
            raise InvalidArgument(
                f"tensor '{name}' refers to chunk {ref.chunk} of {count} on the device"
            )
        nbytes = self._chunks.all[ref.chunk].nbytes
        if ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > nbytes:
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} of a "
                f"chunk of {nbytes} on the device; offsets are multiples of {ALIGNMENT_BYTES}"
            )
        return self._chunks.at(ref.chunk, ref.offset, ref.size)

    def close(self) -> None:
        self._chunks.close()


@dataclass(slots=True)
class _Slot:
    chunk: int = 0
    offset: int = 0
    size: int = 0
    generation: int = 0
    is_taken: bool = False
    is_leased: bool = False  # and not released yet


class DeviceOutput:
    """Any thread may lease; the loop does all else."""

    def __init__(self, device: Device, bytes_max: int, charge: Charge, places: int) -> None:
        self._chunks = _Chunks(device, lane_pb2.ARENA_ROLE_OUTPUT, bytes_max, charge)
        self._bytes_max = bytes_max
        self.epoch = self._chunks.epoch
        self._lock = threading.Lock()
        self._allocator = ArenaAllocator()
        self._slots = [_Slot() for _ in range(places + 1)]  # slot 0 means "no slot"
        self._new_chunks: list[NewChunk] = []
        self._is_closed = False

    @property
    def total_bytes(self) -> int:
        return self._chunks.total_bytes

    @property
    def leased_bytes(self) -> int:
        with self._lock:
            return 0 if self._is_closed else self._allocator.used_bytes

    @property
    def leases(self) -> int:
        return 0 if self._is_closed else sum(slot.is_leased for slot in self._slots)

    def lease(
        self, place: int, sizes: Mapping[str, int]
    ) -> dict[str, tuple[tensor_pb2.ArenaRef, DeviceBytes]]:
        """Room for a call's results, by name: its place's slot, which is not taken.

        Raises ResourceExhausted, CudaError, DeviceLost; Cancelled after `close`.
        """
        rooms = {name: _whole(size) for name, size in sizes.items()}
        size = sum(rooms.values())
        with self._lock:
            if self._is_closed:
                raise Cancelled("the session has ended")
            slot = self._slots[place]
            assert not slot.is_taken
            slot.chunk, slot.offset = self._allocator.allocate(size) or self._grow(size)
            slot.size, slot.is_taken, slot.is_leased = size, True, True
            slot.generation = slot.generation % 0xFFFFFFFF + 1
            found = {}
            offset = slot.offset
            for name, nbytes in sizes.items():
                ref = tensor_pb2.ArenaRef(
                    epoch=self.epoch, chunk=slot.chunk, offset=offset, size=nbytes,
                    slot=place, generation=slot.generation,
                )  # fmt: skip
                found[name] = ref, self._chunks.at(slot.chunk, offset, nbytes)
                offset += rooms[name]
            return found

    def _grow(self, size: int) -> tuple[int, int]:
        chunk = self._chunks.grow(size)
        if chunk is None:
            raise ResourceExhausted(
                f"results of {size} bytes do not fit: {self._allocator.used_bytes} of "
                f"{self._bytes_max} bytes of this session's output memory on the device hold "
                f"results that were not released yet, and the largest free piece has "
                f"{self._allocator.largest_free_bytes}"
            )
        self._allocator.add_chunk(chunk.message.size)
        self._new_chunks.append(chunk)
        place = self._allocator.allocate(size)
        assert place is not None
        return place

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
        if not self.is_leased(ref.slot, ref.generation):
            raise FailedPrecondition(
                f"tensor '{name}' refers to slot {ref.slot}, generation {ref.generation} of this "
                "session's output memory on the device, which holds no result or was released"
            )
        slot = self._slots[ref.slot]
        first, end = ref.offset, ref.offset + ref.size
        is_within = slot.offset <= first and end <= slot.offset + slot.size
        if ref.chunk != slot.chunk or first % ALIGNMENT_BYTES or not is_within:
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {first} to {end} of output chunk {ref.chunk} on "
                f"the device; its slot has {slot.offset} to {slot.offset + slot.size} of chunk "
                f"{slot.chunk}, and offsets are multiples of {ALIGNMENT_BYTES}"
            )
        return self._chunks.at(ref.chunk, first, ref.size)

    def take_new_chunks(self) -> list[NewChunk]:
        """Chunks that must be sent before any response that refers to them."""
        if not self._new_chunks:
            return []
        with self._lock:
            new, self._new_chunks = self._new_chunks, []
            return new

    def stop(self) -> None:
        """Lease nothing any more."""
        with self._lock:
            self._is_closed = True
        for chunk in self.take_new_chunks():
            chunk.close()

    def close(self) -> None:
        """After `stop`, when the device is done with it."""
        self._chunks.close()


def _whole(size: int, unit: int = ALIGNMENT_BYTES) -> int:
    """Bytes, a multiple of the unit and not none."""
    return -(-max(size, 1) // unit) * unit
