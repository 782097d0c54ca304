# SPDX-License-Identifier: Apache-2.0
"""Memory of a session that the worker writes results to.

A slot is leased to the client with the response, and its release gives it back. A generation per
slot makes a late or doubled release harmless. A leased slot may be an input of another request,
where it lies, because the client cannot write it: as long as anything reads it there the slot is
pinned, and a release that comes meanwhile is put off.
"""

import mmap
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.chunks import Budget, Bytes, Charge, Made, MakeChunk, charge_nothing
from thirdrail_server.worker.output_room import OutputRoom, Slot, session_has_ended

POISON = 0xDB
# A chunk may be made on the worker's loop, for a run there: one of this size takes 12 ms.
SPARE_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class _Slot(Slot):
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


class OutputArena(OutputRoom[mmap.mmap]):
    """Any thread may lease; the loop takes new chunks, views and releases."""

    def __init__(
        self,
        bytes_max: int,
        charge: Charge = charge_nothing,
        make_chunk: MakeChunk = create_chunk,
    ) -> None:
        def make(nbytes: int, _least: int) -> Made[mmap.mmap]:
            fd, mapping = make_chunk(nbytes, client_writes=False)
            return Made(mapping, nbytes, fd)

        budget = Budget(bytes_max, charge, spare_bytes_max=SPARE_BYTES_MAX)
        super().__init__(budget, make, "output memory")
        self.poisons = False  # released slots are overwritten
        self.leases = 0  # slots that hold a result, or that a run is about to fill
        self.stale_releases = 0
        self._slots: list[_Slot] = [_Slot()]  # slot 0 means "no slot"
        self._free_slots: list[int] = []
        self._pins: set[_Pin] = set()
        # The collector may end a pin on any thread, also while that one holds the lock: so this is
        # all that it does.
        self._ended_pins: deque[_Pin] = deque()

    # Leasing

    def lease(self, size: int) -> tuple[tensor_pb2.ArenaRef, Bytes]:
        """A slot of `size` bytes, writable for us. Raises ResourceExhausted at a bound, Cancelled
        after `close`."""
        with self._lock:
            if self._is_closed:
                raise session_has_ended()
            self._settle_pins()
            place = self._allocator.allocate(size)
            if place is not None:
                chunk, offset = place
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
        self._grow(size)
        return self.lease(size)

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
            found = self._find(ref.epoch, ref.slot, ref.generation)
            slot = self._checked(name, ref, found, ALIGNMENT_BYTES)
            memory = np.frombuffer(self._chunks[ref.chunk], np.uint8, ref.size, ref.offset)
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

    def close(self) -> list[mmap.mmap]:
        """Let go of the memory; what a run still writes to lives as long as its slot's array. The
        mappings are the caller's to unmap."""
        chunks = super().close()
        self.leases = 0
        return chunks
