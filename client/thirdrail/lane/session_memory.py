# SPDX-License-Identifier: Apache-2.0
"""All memory of one session at the client's end: what lies where, who uses it, what goes back.

Pure bookkeeping on mapped memory, without a socket; both clients use it. Guard it by one lock, or
use it on one event loop; `releases` and `output_bytes` need neither.
"""

import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from thirdrail.errors import Internal, ResourceExhausted, ThirdrailError
from thirdrail.failures import with_note
from thirdrail.lane.allocator import ArenaAllocator
from thirdrail.lane.places import Bytes, Place, Role, ShownPlaces, address_of
from thirdrail.lane.releases import Releases
from thirdrail.v1 import lane_pb2, tensor_pb2

POISON = 0xDB  # what freed memory is filled with in debug mode, on both sides

_RESULTS = (
    "borrowed results keep {} bytes of the lane's memory: `with`, release(), or the end of all "
    "views gives them back"
)
_INPUTS = "arrays of empty() keep {} bytes of the lane's memory: the end of all views gives it back"


class SessionMemory:
    """The arenas of an attached session.

    is_debug: input memory that nobody uses any more is filled with POISON.
    """

    def __init__(self, attached: lane_pb2.Attached, *, is_debug: bool = False) -> None:
        self._input_epoch = attached.input_epoch
        self._output_epoch = attached.output_epoch
        self._input_bytes_max = attached.limits.input_arena_bytes
        self._is_debug = is_debug
        self._input_chunks: list[Bytes | None] = []  # by number; None: given back
        self._output_chunks: list[Bytes] = []
        self._allocator = ArenaAllocator()
        self._allocated_from: list[int] = []  # the allocator's chunk numbers -> the arena's
        self._allocator_chunks: dict[int, int] = {}  # and back
        self._alone_bytes = 0
        self.shown = ShownPlaces()
        self.releases = Releases()
        self.revoked: set[int] = set()  # epochs of imported tensors
        self.drops: list[tuple[int, int]] = []  # (epoch, chunk) to give back with a DropRequest

    @property
    def input_bytes_used(self) -> int:
        return self._allocator.used_bytes + self._alone_bytes

    # Input

    def add_chunk(self, chunk: lane_pb2.Chunk, memory: Bytes) -> Place | None:
        """A chunk that came. Returns the place of one that was asked for alone.

        Raises ValueError for one that is not the next of its arena.
        """
        is_output = chunk.role == lane_pb2.ARENA_ROLE_OUTPUT
        epoch = self._output_epoch if is_output else self._input_epoch
        number = len(self._output_chunks if is_output else self._input_chunks)
        if (chunk.epoch, chunk.chunk) != (epoch, number):
            raise ValueError(
                f"chunk {chunk.chunk} of epoch {chunk.epoch}, expected {number} of {epoch}"
            )
        if is_output:
            self._output_chunks.append(memory)
            return None
        self._input_chunks.append(memory)
        if chunk.alone:
            self._alone_bytes += memory.nbytes
            return Place(Role.ALONE, memory, self._input_epoch, number, 0, memory.nbytes)
        self._allocator_chunks[number] = self._allocator.add_chunk(memory.nbytes)
        self._allocated_from.append(number)
        return None

    def reserve(self, sizes: Sequence[int]) -> list[Place] | None:
        """Pieces of input memory for one call: all of them, or None where there is no room now.

        Calls that wait for room hold none, so that no two of them wait for each other. Raises
        ResourceExhausted where waiting cannot help.
        """
        total = sum(sizes)
        if total > self._input_bytes_max:
            raise ResourceExhausted(
                f"tensors of {total} bytes do not fit the input arena of {self._input_bytes_max} "
                "bytes"
            )
        places: list[Place] = []
        for size in sizes:
            found = self._allocator.allocate(size)
            if found is None:
                self.leave_all(places)
                return None
            places.append(self._place(found, size))
        return places

    def growth_for(self, sizes: Sequence[int]) -> int | None:
        """Bytes to ask the worker for, so that a call may find room. None: wait for a call's end.

        Raises ResourceExhausted where no call's end will give any: the rest is held by arrays.
        """
        size = max(sizes)
        left = self._input_bytes_max - self._allocator.total_bytes - self._alone_bytes
        if -(-size // mmap.PAGESIZE) * mmap.PAGESIZE <= left:
            return size
        if self._allocator.used_count > self.shown.count(Role.INPUT):
            return None
        if not self.input_bytes_used:
            raise ResourceExhausted(
                f"a tensor of {size} bytes fits no piece of the input arena: all of its "
                f"{self._allocator.total_bytes} bytes are free, of {self._input_bytes_max} that it "
                "may have, but in smaller pieces"
            )
        raise ResourceExhausted(
            f"no room for {sum(sizes)} bytes of input: arrays of client.empty() hold "
            f"{self.input_bytes_used} of the {self._input_bytes_max} bytes that this session's "
            "input arena may have; let go of some of them"
        )

    def with_holdings(self, error: ThirdrailError) -> ThirdrailError:
        """The error with a note on what to do. Where memory is short, that is to give back what the
        caller keeps of it, if he does. Needs no lock.
        """
        notes = []
        if isinstance(error, ResourceExhausted):
            if results := self.shown.held_bytes(Role.OUTPUT):
                notes.append(_RESULTS.format(results))
            if inputs := self.shown.held_bytes(Role.INPUT, Role.ALONE):
                notes.append(_INPUTS.format(inputs))
        for note in notes:
            error.add_note(note)
        return error if notes else with_note(error)

    def _place(self, found: tuple[int, int], size: int) -> Place:
        chunk, offset = self._allocated_from[found[0]], found[1]
        memory = self._input_chunks[chunk]
        assert memory is not None
        return Place(
            Role.INPUT, memory[offset : offset + size], self._input_epoch, chunk, offset, size
        )

    def find(self, array: npt.NDArray[np.generic]) -> tuple[Place, int] | None:
        """Where a contiguous array lies in this session's memory: a place and an offset in it."""
        if not len(self.shown):
            return None
        address = address_of(array)
        place = self.shown.find(address, array.nbytes)
        return None if place is None else (place, address - place.address)

    def leave(self, place: Place) -> None:
        """One user less; the last one gives the memory back."""
        place.users -= 1
        if place.users > 0:
            return
        if place.role is Role.INPUT:
            if self._is_debug:
                place.memory.fill(POISON)
            self._allocator.free(self._allocator_chunks[place.chunk], place.offset)
        elif place.role is Role.OUTPUT:
            self.releases.add(place.epoch, place.slot, place.generation, place.size)
        else:
            self.drops.append((place.epoch, place.chunk))
            self.revoked.discard(place.epoch)
            if place.role is Role.ALONE:
                self._alone_bytes -= place.memory.nbytes
                self._input_chunks[place.chunk] = None

    def leave_all(self, places: Sequence[Place]) -> None:
        for place in places:
            self.leave(place)

    def collect(self) -> bool:
        """Give back what arrays showed that are gone. Whether there was any."""
        if not self.shown.has_collected:
            return False
        collected = self.shown.take_collected()
        self.leave_all(collected)
        return bool(collected)

    # Output

    def output_bytes(self, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes of a result. Raises Internal for a place that the worker cannot mean."""
        chunk = self._output_chunks[ref.chunk] if ref.chunk < len(self._output_chunks) else None
        if (
            ref.epoch != self._output_epoch
            or chunk is None
            or (ref.offset + ref.size > chunk.nbytes)
        ):
            raise Internal("the worker referred to memory outside its arena")
        return chunk[ref.offset : ref.offset + ref.size]

    def output_place(self, ref: tensor_pb2.ArenaRef) -> Place:
        """The same as a place that can be shown. Raises Internal."""
        return Place(
            Role.OUTPUT, self.output_bytes(ref), ref.epoch, ref.chunk, ref.offset, ref.size,
            ref.slot, ref.generation,
        )  # fmt: skip
