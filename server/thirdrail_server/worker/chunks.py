# SPDX-License-Identifier: Apache-2.0
"""Pieces of an arena: how large, charged to whom, and on their way to the client."""

import itertools
import mmap
import os
from dataclasses import dataclass
from typing import Protocol

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


def charged_chunk_bytes(
    size: int,
    total: int,
    total_max: int,
    charge: Charge,
    granularity_bytes: int = mmap.PAGESIZE,
) -> int | None:
    """How large a chunk to make for a piece of `size` bytes, and that much charged: doubling the
    arena, or, where that is too much, only what is needed. None: it does not fit the arena.

    granularity_bytes: chunks have a multiple of it, which is a power of two.
    Raises ResourceExhausted where not even that can be charged.
    """
    needed = -(-max(size, 1) // granularity_bytes) * granularity_bytes
    left = total_max - total
    if needed > left:
        return None
    generous = max(CHUNK_BYTES_MIN, granularity_bytes, total, 1 << (needed - 1).bit_length())
    if needed < generous <= left:
        try:
            charge(generous, is_spare=True)
        except ResourceExhausted:
            pass
        else:
            return generous
    charge(needed)
    return needed
