# SPDX-License-Identifier: Apache-2.0
"""The memory of one lane session, all of it made by the worker.

The client decides what lies where in the input arena; here its references are only checked and
turned into views. The output arena is the worker's: results are written into slots, a slot is
leased to the client with the response, and its release gives it back. A generation per slot makes a
late or doubled release harmless.
"""

import itertools
import mmap
import os
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thirdrail.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ALIGNMENT_BYTES, ArenaAllocator
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import lane_pb2, tensor_pb2

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES_MIN = 1 << 20

_epochs = itertools.count(1)  # never used twice in one worker


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk that the client does not know of yet. Sending it closes the descriptor."""

    message: lane_pb2.Chunk
    fd: int

    def close(self) -> None:
        os.close(self.fd)


def _chunk_bytes(size: int, total: int, total_max: int) -> int | None:
    """How large a chunk to make for a piece of `size` bytes: doubling, within the arena's bound."""
    needed = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    left = total_max - total
    if needed > left:
        return None
    generous = max(CHUNK_BYTES_MIN, total, 1 << (needed - 1).bit_length())
    return generous if generous <= left else needed


class InputArena:
    """Memory that the client writes and that requests refer to."""

    def __init__(self, bytes_max: int) -> None:
        self.epoch = next(_epochs)
        self._bytes_max = bytes_max
        self._chunks: list[mmap.mmap] = []

    @property
    def total_bytes(self) -> int:
        return sum(map(len, self._chunks))

    def grow(self, size: int) -> NewChunk:
        """One more chunk with room for `size` bytes. Raises ResourceExhausted at the bound, OSError
        where the host has no memory. Takes long for large chunks: call it off the loop.
        """
        chunk_bytes = _chunk_bytes(size, self.total_bytes, self._bytes_max)
        if chunk_bytes is None:
            raise ResourceExhausted(
                f"{size} more bytes of input memory were asked for, {self.total_bytes} of "
                f"{self._bytes_max} are in use"
            )
        fd, mapping = create_chunk(chunk_bytes, client_writes=True)
        self._chunks.append(mapping)
        number = len(self._chunks) - 1
        message = lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_INPUT, epoch=self.epoch, chunk=number, size=chunk_bytes
        )
        return NewChunk(message, fd)

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to.

        Raises FailedPrecondition for another epoch, InvalidArgument for a place outside the chunk.
        """
        if ref.epoch != self.epoch:
            raise FailedPrecondition(
                f"tensor '{name}' refers to epoch {ref.epoch}, this session's input arena is "
                f"{self.epoch}"
            )
        if ref.chunk >= len(self._chunks):
            raise InvalidArgument(
                f"tensor '{name}' refers to chunk {ref.chunk} of {len(self._chunks)}"
            )
        chunk = self._chunks[ref.chunk]
        if ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > len(chunk):
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} of a "
                f"chunk of {len(chunk)}; offsets are multiples of {ALIGNMENT_BYTES}"
            )
        return np.frombuffer(chunk, np.uint8, ref.size, ref.offset)

    def close(self) -> list[mmap.mmap]:
        """Let go of the memory; what a request still reads lives as long as its view. The mappings
        are the caller's to unmap."""
        chunks, self._chunks = self._chunks, []
        return chunks


@dataclass(slots=True)
class _Slot:
    chunk: int
    offset: int
    generation: int
    is_leased: bool


class OutputArena:
    """Memory that results are written to. Any thread may lease; the loop takes `new_chunks` and
    releases.
    """

    def __init__(self, bytes_max: int) -> None:
        self.epoch = next(_epochs)
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._allocator = ArenaAllocator()
        self._chunks: list[mmap.mmap] = []
        self._new_chunks: list[NewChunk] = []
        self._slots: list[_Slot] = [_Slot(0, 0, 0, True)]  # slot 0 means "no slot"
        self._free_slots: list[int] = []
        self._is_closed = False
        self.leases = 0  # slots that hold a result, or a run is about to fill
        self.stale_releases = 0

    @property
    def total_bytes(self) -> int:
        return self._allocator.total_bytes

    @property
    def leased_bytes(self) -> int:
        return self._allocator.used_bytes

    def lease(self, size: int) -> tuple[tensor_pb2.ArenaRef, Bytes]:
        """A slot of `size` bytes, writable for us. Raises ResourceExhausted at the bound, Cancelled
        after `close`."""
        with self._lock:
            if self._is_closed:
                raise Cancelled("the session has ended")
            place = self._allocator.allocate(size) or self._grow(size)
            chunk, offset = place
            number = self._free_slots.pop() if self._free_slots else len(self._slots)
            if number == len(self._slots):
                self._slots.append(_Slot(0, 0, 0, False))
            slot = self._slots[number]
            slot.chunk, slot.offset, slot.is_leased = chunk, offset, True
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
        chunk_bytes = _chunk_bytes(size, self._allocator.total_bytes, self._bytes_max)
        if chunk_bytes is None:
            raise ResourceExhausted(
                f"a result of {size} bytes does not fit: {self.leased_bytes} of {self._bytes_max} "
                "bytes of this session's output memory hold results that were not released yet"
            )
        try:
            fd, mapping = create_chunk(chunk_bytes, client_writes=False)
        except OSError as error:
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
            slot = self._slots[number] if 0 < number < len(self._slots) else None
            if (
                slot is None
                or epoch != self.epoch
                or not slot.is_leased
                or slot.generation != generation
            ):
                self.stale_releases += 1
                return
            slot.is_leased = False
            self.leases -= 1
            self._allocator.free(slot.chunk, slot.offset)
            self._free_slots.append(number)

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
            chunks, self._chunks = self._chunks, []
        for chunk in self.take_new_chunks():
            chunk.close()
        return chunks
