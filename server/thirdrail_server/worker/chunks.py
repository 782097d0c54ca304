# SPDX-License-Identifier: Apache-2.0
"""Pieces of an arena: how large, charged to whom, and on their way to the client."""

import contextlib
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from thirdrail.errors import ResourceExhausted
from thirdrail.v1 import lane_pb2

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES_MIN = 1 << 20


class Charge(Protocol):
    def __call__(self, size: int, /, *, is_spare: bool = False) -> None:
        """Take so many more bytes in the books of all sessions; less where `size` is negative.

        is_spare: it would be good to have, and nobody is to end for it.
        Raises ResourceExhausted.
        """


class MakeChunk(Protocol):
    """See thirdrail.lane.memory.create_chunk."""

    def __call__(self, size: int, *, client_writes: bool) -> tuple[int, mmap.mmap]: ...


_epochs = itertools.count(1)


def new_epoch() -> int:
    """A number of an arena, or of an imported tensor: never used twice in one worker."""
    return next(_epochs)


def charge_nothing(size: int, /, *, is_spare: bool = False) -> None:
    """For a session that no quota applies to."""


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk that the client does not know of yet. Sending it closes the descriptor."""

    message: lane_pb2.Chunk
    fd: int

    def close(self) -> None:
        os.close(self.fd)


class Memory(Protocol):
    def close(self) -> None: ...


M = TypeVar("M", bound=Memory)


@dataclass(frozen=True, slots=True)
class Made(Generic[M]):
    """A chunk, and a descriptor of it for the client. Both are the caller's to close."""

    memory: M
    nbytes: int
    fd: int


class Budget:
    """The bytes of one arena: bounded, and charged in the books of all sessions. Any thread.

    granularity_bytes: chunks have a multiple of it, which is a power of two.
    spare_bytes_max: how large a chunk is made where less is needed.
    """

    def __init__(
        self,
        bytes_max: int,
        charge: Charge,
        *,
        granularity_bytes: int = mmap.PAGESIZE,
        spare_bytes_max: int | None = None,
    ) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0  # also when the arena is closed: until its memory is given back
        self._charge = charge
        self._granularity_bytes = granularity_bytes
        self._spare_bytes_max = bytes_max if spare_bytes_max is None else spare_bytes_max
        self._lock = threading.Lock()

    def take(self, size: int, *, is_spare: bool = False) -> bool:
        """Exactly so much. False: it does not fit the arena. Raises what `Charge` does."""
        with self._lock:
            if self.used_bytes + size > self.bytes_max:
                return False
            self._charge(size, is_spare=is_spare)
            self.used_bytes += size
            return True

    def take_chunk(self, size: int) -> int | None:
        """How large a chunk to make for a piece of `size` bytes, and that much taken: a power of
        two, for huge pages, that about doubles the arena, or, where that is too much, only what is
        needed. None: it does not fit the arena.

        Raises ResourceExhausted where not even that can be charged.
        """
        needed = self._whole(size)
        double = min(self.used_bytes, self._spare_bytes_max)
        generous = max(
            CHUNK_BYTES_MIN,
            self._granularity_bytes,
            1 << double.bit_length() >> 1,
            1 << (needed - 1).bit_length(),
        )
        with contextlib.suppress(ResourceExhausted):
            if generous > needed and self.take(generous, is_spare=True):
                return generous
        return needed if self.take(needed) else None

    def make(self, size: int, make: Callable[[int, int], Made[M]]) -> Made[M] | None:
        """A chunk with room for a piece of `size` bytes. None: it does not fit the arena.

        make: one of so many bytes, or of fewer, but no fewer than the second number.
        Raises ResourceExhausted where it cannot be charged, and what `make` raises.
        """
        nbytes = self.take_chunk(size)
        if nbytes is None:
            return None
        try:
            made = make(nbytes, self._whole(size))
        except BaseException:
            self.give_back(nbytes)
            raise
        if made.nbytes < nbytes:
            self.give_back(nbytes - made.nbytes)
        return made

    def _whole(self, size: int) -> int:
        return -(-max(size, 1) // self._granularity_bytes) * self._granularity_bytes

    def give_back(self, size: int) -> None:
        with self._lock:
            self.used_bytes -= size
        self._charge(-size)
