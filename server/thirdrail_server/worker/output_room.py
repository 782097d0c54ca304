# SPDX-License-Identifier: Apache-2.0
"""Room for a session's results: chunks, of which more are made, and the pieces of them.

What a piece is leased as, and when it is free again, is its arena's affair: see `output_arena` and
`device_arenas`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from thirdrail.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ArenaAllocator
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import Budget, M, Made, NewChunk, new_epoch


@dataclass(slots=True)
class Slot:
    """A piece that may be leased. Its generation, of 32 bits, makes a late release harmless."""

    chunk: int = 0
    offset: int = 0
    size: int = 0
    generation: int = 0
    is_leased: bool = False


S = TypeVar("S", bound=Slot)


def session_has_ended() -> Cancelled:
    return Cancelled("the session has ended")


class OutputRoom(Generic[M]):
    """What the arenas for results have in common. Any thread may lease; the loop does all else.

    make: see Budget.make. It takes long. Raises OSError or ResourceExhausted where there is no
        memory.
    where: how people know it, e.g. "output memory".

    The lock is of the books here and of the arena's own. Nobody holds it while memory is made: the
    loop would wait for it, and with the loop all sessions.
    """

    def __init__(self, budget: Budget, make: Callable[[int, int], Made[M]], where: str) -> None:
        self.epoch = new_epoch()
        self._lock = threading.Lock()
        self._allocator = ArenaAllocator()
        self._chunks: list[M] = []
        self._is_closed = False
        self._budget = budget
        self._make = make
        self._where = where
        self._new_chunks: list[NewChunk] = []

    @property
    def total_bytes(self) -> int:
        """Also after `close`: until it is given back."""
        return self._budget.used_bytes

    @property
    def leased_bytes(self) -> int:
        with self._lock:
            return 0 if self._is_closed else self._allocator.used_bytes

    def _grow(self, size: int) -> None:
        """One more chunk with room for `size` bytes; whoever is quicker may take it. Without the
        lock.

        Raises ResourceExhausted at a bound, Cancelled after `close`, what `make` raises.
        """
        try:
            made = self._budget.make(size, self._make)
        except OSError as error:
            text = f"the worker can make no memory for a result of {size} bytes: {error.strerror}"
            raise ResourceExhausted(text) from None
        if made is None:
            raise self._full(size)
        if not self._add(made):
            self._budget.give_back(made.nbytes)
            raise session_has_ended()

    def _add(self, made: Made[M]) -> bool:
        """False: it came too late."""
        message = lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_OUTPUT, epoch=self.epoch, size=made.nbytes
        )
        chunk = NewChunk(message, made.fd)
        with self._lock:
            if not self._is_closed:
                message.chunk = self._allocator.add_chunk(made.nbytes)
                self._chunks.append(made.memory)
                self._new_chunks.append(chunk)
                return True
        chunk.close()
        made.memory.close()
        return False

    def _full(self, size: int) -> ResourceExhausted:
        with self._lock:
            used, free = self._allocator.used_bytes, self._allocator.largest_free_bytes
        return ResourceExhausted(
            f"a result of {size} bytes does not fit: {used} of {self._budget.bytes_max} bytes of "
            f"this session's {self._where} hold results that were not released yet, and the "
            f"largest free piece has {free}"
        )

    def _checked(self, name: str, ref: tensor_pb2.ArenaRef, slot: S | None, alignment: int) -> S:
        """The slot that tensor `name` lies in. None: there is none that is leased just so.

        alignment: of offsets, in bytes. Raises FailedPrecondition, InvalidArgument.
        """
        if slot is None or self._is_closed:
            raise FailedPrecondition(
                f"tensor '{name}' refers to slot {ref.slot}, generation {ref.generation} of this "
                f"session's {self._where}, which holds no result or was released"
            )
        first, end = ref.offset, ref.offset + ref.size
        is_within = slot.offset <= first and end <= slot.offset + slot.size
        if ref.chunk != slot.chunk or first % alignment or not is_within:
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {first} to {end} of chunk {ref.chunk} of the "
                f"{self._where}; its slot has {slot.offset} to {slot.offset + slot.size} of chunk "
                f"{slot.chunk}, and offsets are multiples of {alignment}"
            )
        return slot

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

    def close(self) -> list[M]:
        """Lease nothing any more. The memory is the caller's to give back."""
        with self._lock:
            self._is_closed = True
            chunks, self._chunks = self._chunks, []
        for chunk in self.take_new_chunks():
            chunk.close()
        return chunks
