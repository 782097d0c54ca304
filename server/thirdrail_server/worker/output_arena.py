# SPDX-License-Identifier: Apache-2.0
"""Memory of a session that the worker writes results to.

A slot is leased to the client with the response, and its release gives it back. A generation per
slot makes a late or doubled release harmless. A leased slot may be an input of another request,
where it lies, because the client cannot write it: as long as anything reads it there the slot is
pinned, and a release that comes meanwhile is put off.
"""

import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ALIGNMENT_BYTES, ArenaAllocator
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import (
    Bytes,
    Charge,
    MakeChunk,
    NewChunk,
    charge_nothing,
    charged_chunk_bytes,
    new_epoch,
)

POISON = 0xDB


@dataclass(slots=True)
class _Slot:
    chunk: int = 0
    offset: int = 0
    size: int = 0
    generation: int = 0
    is_leased: bool = False
    pins: int = 0  # arrays that requests read it through; with some, it is not free yet


class _Anchor:
    """The base of every array over a pinned slot. numpy shortens a chain of its own arrays, so that
    one of those would not live as long as the views of it.
    """

    __slots__ = ("__array_interface__", "__weakref__", "_memory")

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        interface: dict[str, Any] = dict(memory.__array_interface__)
        interface["data"] = (interface["data"][0], True)  # read-only
        self.__array_interface__ = interface


class _Pin(weakref.ref[_Anchor]):
    """Tells when nothing reads the slot any more."""

    __slots__ = ("slot",)
    slot: int


class OutputArena:
    """Any thread may lease; the loop takes new chunks, views and releases."""

    def __init__(
        self,
        bytes_max: int,
        charge: Charge = charge_nothing,
        make_chunk: MakeChunk = create_chunk,
    ) -> None:
        self.epoch = new_epoch()
        self.poisons = False  # released slots are overwritten
        self.leases = 0  # slots that hold a result, or that a run is about to fill
        self.stale_releases = 0
        self._bytes_max = bytes_max
        self._charge = charge
        self._make_chunk = make_chunk
        self._lock = threading.Lock()
        self._allocator = ArenaAllocator()
        self._chunks: list[mmap.mmap] = []
        self._new_chunks: list[NewChunk] = []
        self._slots: list[_Slot] = [_Slot()]  # slot 0 means "no slot"
        self._free_slots: list[int] = []
        self._pins: set[_Pin] = set()
        # The collector may end a pin on any thread, also while that one holds the lock: so this is
        # all that it does.
        self._ended_pins: deque[_Pin] = deque()
        self._is_closed = False

    @property
    def total_bytes(self) -> int:
        """Also after `close`: until it is unmapped."""
        return self._allocator.total_bytes

    @property
    def leased_bytes(self) -> int:
        with self._lock:
            return 0 if self._is_closed else self._allocator.used_bytes

    # Leasing

    def lease(self, size: int) -> tuple[tensor_pb2.ArenaRef, Bytes]:
        """A slot of `size` bytes, writable for us. Raises ResourceExhausted at a bound, Cancelled
        after `close`."""
        with self._lock:
            if self._is_closed:
                raise Cancelled("the session has ended")
            self._settle_pins()
            chunk, offset = self._allocator.allocate(size) or self._grow(size)
            number = self._free_slots.pop() if self._free_slots else len(self._slots)
            if number == len(self._slots):
                self._slots.append(_Slot())
            slot = self._slots[number]
            slot.chunk, slot.offset, slot.size, slot.is_leased = chunk, offset, size, True
            slot.generation = slot.generation % 0xFFFFFFFF + 1
            self.leases += 1
            ref = tensor_pb2.ArenaRef(
                epoch=self.epoch,
                chunk=chunk,
                offset=offset,
                size=size,
                slot=number,
                generation=slot.generation,
            )
            return ref, np.frombuffer(self._chunks[chunk], np.uint8, size, offset)

    def _grow(self, size: int) -> tuple[int, int]:
        total = self._allocator.total_bytes
        chunk_bytes = charged_chunk_bytes(size, total, self._bytes_max, self._charge)
        if chunk_bytes is None:
            raise ResourceExhausted(
                f"a result of {size} bytes does not fit: {self._allocator.used_bytes} of "
                f"{self._bytes_max} bytes of this session's output memory hold results that were "
                f"not released yet, and the largest free piece has "
                f"{self._allocator.largest_free_bytes}"
            )
        try:
            fd, mapping = self._make_chunk(chunk_bytes, client_writes=False)
        except OSError as error:
            self._charge(-chunk_bytes)
            raise ResourceExhausted(f"no memory for a result of {size} bytes: {error}") from None
        self._chunks.append(mapping)
        number = self._allocator.add_chunk(chunk_bytes)
        message = lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_OUTPUT, epoch=self.epoch, chunk=number, size=chunk_bytes
        )
        self._new_chunks.append(NewChunk(message, fd))
        place = self._allocator.allocate(size)
        assert place is not None
        return place

    def release(self, epoch: int, number: int, generation: int) -> None:
        """Take a slot back. One that is not leased so is ignored and counted."""
        with self._lock:
            slot = self._find(epoch, number, generation)
            if slot is None:
                self.stale_releases += 1
                return
            self._settle_pins()  # while it is leased, or it would be freed here and below
            slot.is_leased = False
            if not self._is_closed:  # which has counted all of them off
                self.leases -= 1
            if not slot.pins:
                self._free(number)

    def _find(self, epoch: int, number: int, generation: int) -> _Slot | None:
        """The slot, where it is leased just so."""
        if epoch != self.epoch or not 0 < number < len(self._slots):
            return None
        slot = self._slots[number]
        return slot if slot.is_leased and slot.generation == generation else None

    def _free(self, number: int) -> None:
        slot = self._slots[number]
        if self.poisons and not self._is_closed:
            np.frombuffer(self._chunks[slot.chunk], np.uint8, slot.size, slot.offset)[:] = POISON
        self._allocator.free(slot.chunk, slot.offset)
        self._free_slots.append(number)

    # Reading, as the input of a request

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to, read-only; they stay as they are until the
        last array over them is gone.

        Raises FailedPrecondition for a slot that is not leased so, InvalidArgument for a place
        outside of it.
        """
        with self._lock:
            slot = self._find(ref.epoch, ref.slot, ref.generation)
            if slot is None or self._is_closed:
                raise FailedPrecondition(
                    f"tensor '{name}' refers to slot {ref.slot}, generation {ref.generation} of "
                    "this session's output memory, which holds no result or was released"
                )
            first, end = ref.offset, ref.offset + ref.size
            if (
                ref.chunk != slot.chunk
                or first % ALIGNMENT_BYTES
                or first < slot.offset
                or end > slot.offset + slot.size
            ):
                raise InvalidArgument(
                    f"tensor '{name}' refers to bytes {first} to {end} of output chunk {ref.chunk};"
                    f" its slot has {slot.offset} to {slot.offset + slot.size} of chunk "
                    f"{slot.chunk}, and offsets are multiples of {ALIGNMENT_BYTES}"
                )
            memory = np.frombuffer(self._chunks[ref.chunk], np.uint8, ref.size, first)
            anchor = _Anchor(memory)
            pin = _Pin(anchor, self._ended_pins.append)
            pin.slot = ref.slot
            self._pins.add(pin)
            slot.pins += 1
            return np.asarray(anchor)

    def _settle_pins(self) -> None:
        while self._ended_pins:
            pin = self._ended_pins.popleft()
            self._pins.discard(pin)
            slot = self._slots[pin.slot]
            slot.pins -= 1
            if not slot.pins and not slot.is_leased:
                self._free(pin.slot)

    # The client's side

    @property
    def has_new_chunks(self) -> bool:
        return bool(self._new_chunks)

    def take_new_chunks(self) -> list[NewChunk]:
        """Chunks that must be sent before any response that refers to them."""
        if not self._new_chunks:
            return []
        with self._lock:
            new, self._new_chunks = self._new_chunks, []
            return new

    def close(self) -> list[mmap.mmap]:
        """Let go of the memory; what a run still writes to lives as long as its slot's array. The
        mappings are the caller's to unmap."""
        with self._lock:
            self._is_closed = True
            self.leases = 0
            chunks, self._chunks = self._chunks, []
        for chunk in self.take_new_chunks():
            chunk.close()
        return chunks
