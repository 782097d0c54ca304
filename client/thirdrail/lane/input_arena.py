# SPDX-License-Identifier: Apache-2.0
"""The client's input arena: the worker gives the memory, the client decides what lies where.

A tensor's place is its own from `place` until `free`. When nothing is free the arena asks the
worker for another chunk, and when it may not grow any further it waits until a call ends.
"""

import asyncio
import mmap
from collections.abc import Callable, Sequence

import numpy as np

from thirdrail.dtypes import Buffer
from thirdrail.errors import ResourceExhausted, Unavailable
from thirdrail.failures import anew
from thirdrail.lane.allocator import ALIGNMENT_BYTES, ArenaAllocator
from thirdrail.v1.tensor_pb2 import ArenaRef

# Copies above this size run beside the event loop: about 0.2 ms, where a hand-over costs about 0.1
# ms.
COPY_ON_LOOP_BYTES_MAX = 1 << 20

Place = tuple[int, int]  # chunk, offset


class Source:
    """Tensor bytes that are not in our memory yet, for example in a file. To be derived from."""

    size: int  # bytes

    def read_into(self, target: memoryview) -> None:
        """Fill all of `target`, which has `size` bytes. May be called in another thread.

        Raises what is to be told to the caller.
        """
        raise NotImplementedError


Piece = Buffer | Source


def size_of(piece: Piece) -> int:
    """In bytes."""
    return piece.size if isinstance(piece, Source) else memoryview(piece).nbytes


def bytes_of(piece: Piece) -> bytes:
    """Its bytes now. Raises what a source raises."""
    if not isinstance(piece, Source):
        return bytes(piece)
    target = bytearray(piece.size)
    piece.read_into(memoryview(target))
    return bytes(target)


def _fill(targets: Sequence[memoryview], pieces: Sequence[Piece]) -> None:
    for target, piece in zip(targets, pieces, strict=True):
        if isinstance(piece, Source):
            piece.read_into(target)
        else:  # by numpy, which lets other threads run meanwhile
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(piece, np.uint8))


class InputArena:
    """Places for tensor bytes, on one event loop.

    request_growth: sends a GrowRequest for one piece of so many bytes; the answer arrives by
        `grown` or `refused`.
    """

    def __init__(self, epoch: int, bytes_max: int, request_growth: Callable[[int], None]) -> None:
        self._epoch = epoch
        self._bytes_max = bytes_max
        self._request_growth = request_growth
        self._allocator = ArenaAllocator()
        self._chunks: list[mmap.mmap] = []
        self._growing: asyncio.Future[None] | None = None
        self._waiting_for_space: list[asyncio.Future[None]] = []
        self._ended: Unavailable | None = None

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    async def place(self, pieces: Sequence[Piece]) -> list[ArenaRef]:
        """Copy the inputs of one call into the arena.

        Calls that wait for space hold none, so that no two of them wait for each other.
        Raises ResourceExhausted when they can never fit, Unavailable when the lane has ended, and
        whatever a piece raises that cannot be read.
        """
        sizes = [size_of(piece) for piece in pieces]
        places = await self._reserve(sizes)
        targets = [
            memoryview(self._chunks[chunk])[offset : offset + size]
            for (chunk, offset), size in zip(places, sizes, strict=True)
        ]
        try:
            if sum(sizes) <= COPY_ON_LOOP_BYTES_MAX:
                _fill(targets, pieces)
            else:
                await self._fill_beside_loop(targets, pieces, places)
        except BaseException:
            self._free_places(places)
            raise
        return [
            ArenaRef(epoch=self._epoch, chunk=chunk, offset=offset, size=size)
            for (chunk, offset), size in zip(places, sizes, strict=True)
        ]

    async def _reserve(self, sizes: list[int]) -> list[Place]:
        total = sum(sizes)
        if total > self._bytes_max:
            raise ResourceExhausted(
                f"a call with tensors of {total} bytes does not fit the input arena of "
                f"{self._bytes_max} bytes"
            )
        while True:
            places: list[Place] = []
            for size in sizes:
                place = self._find(size)
                if place is None:
                    break
                places.append(place)
            else:
                return places
            for taken in places:  # back as if never taken: there is nothing new to wake others for
                self._allocator.free(*taken)
            await self._make_space(size)

    def _find(self, size: int) -> Place | None:
        if self._ended is not None:
            raise anew(self._ended)
        return self._allocator.allocate(size)

    async def _fill_beside_loop(
        self, targets: list[memoryview], pieces: Sequence[Piece], places: list[Place]
    ) -> None:
        filling = asyncio.get_running_loop().run_in_executor(None, _fill, targets, pieces)
        try:
            await asyncio.wait((filling,))
        except asyncio.CancelledError:
            # The copy cannot be stopped: its places stay taken until it has ended.
            taken = list(places)
            places.clear()
            filling.add_done_callback(lambda _: self._free_places(taken))
            filling.add_done_callback(asyncio.Future.exception)  # nobody else will look
            raise
        filling.result()

    def free(self, ref: ArenaRef) -> None:
        self._free_places([(ref.chunk, ref.offset)])

    def _free_places(self, places: list[Place]) -> None:
        if not places:
            return
        for place in places:
            self._allocator.free(*place)
        waiting, self._waiting_for_space = self._waiting_for_space, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _make_space(self, size: int) -> None:
        """Wait until the arena has changed in a way that may help."""
        loop = asyncio.get_running_loop()
        if self._growing is None:
            if self._allocator.total_bytes + size + ALIGNMENT_BYTES > self._bytes_max:
                if not self._allocator.used_bytes:  # all is free, and in too small pieces
                    raise ResourceExhausted(
                        f"a tensor of {size} bytes does not fit the input arena's chunks, which "
                        f"have {self._allocator.total_bytes} of {self._bytes_max} bytes together"
                    )
                freed = loop.create_future()
                self._waiting_for_space.append(freed)
                await freed
                return
            self._growing = loop.create_future()
            self._request_growth(size)
        await asyncio.shield(self._growing)

    def grown(self, chunk: mmap.mmap) -> None:
        """A new chunk has come."""
        self._chunks.append(chunk)
        self._allocator.add_chunk(len(chunk))
        if self._growing is not None:
            self._growing.set_result(None)
            self._growing = None

    def refused(self, message: str) -> None:
        """The worker has no more memory for us."""
        if self._growing is not None:
            self._fail(self._growing, ResourceExhausted(message))
            self._growing = None

    def close(self, error: Unavailable) -> None:
        """The lane has ended: whoever waits, fails; the memory goes with the last copy into it."""
        self._ended = error
        self._chunks.clear()
        if self._growing is not None:
            self._waiting_for_space.append(self._growing)
            self._growing = None
        for future in self._waiting_for_space:
            if not future.done():
                self._fail(future, error)
        self._waiting_for_space = []

    @staticmethod
    def _fail(future: asyncio.Future[None], error: Exception) -> None:
        future.set_exception(error)
        future.exception()  # retrieved here: nobody may be waiting any more
