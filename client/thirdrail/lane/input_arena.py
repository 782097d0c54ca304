# SPDX-License-Identifier: Apache-2.0
"""The client's input arena: the worker gives the memory, the client decides what lies where.

A tensor's place is its own from `place` until `free`. When nothing is free the arena asks the
worker for another chunk, and when it may not grow any further it waits until a call ends.
"""

import asyncio
import mmap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from thirdrail.dtypes import Buffer
from thirdrail.errors import ResourceExhausted, Unavailable
from thirdrail.lane.allocator import ALIGNMENT_BYTES, ArenaAllocator
from thirdrail.v1.tensor_pb2 import ArenaRef

# Copies above this size run beside the event loop: about 0.2 ms, where a hand-over costs about 0.1
# ms.
COPY_ON_LOOP_BYTES_MAX = 1 << 20

_Bytes = npt.NDArray[np.uint8]


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

    async def place(self, data: Buffer) -> ArenaRef:
        """Copy `data` into the arena.

        Raises ResourceExhausted when it can never fit, Unavailable when the lane has ended.
        """
        size = memoryview(data).nbytes
        while (place := self._find(size)) is None:
            await self._make_space(size)
        chunk, offset = place
        target = np.frombuffer(self._chunks[chunk], np.uint8, size, offset)
        source = np.frombuffer(data, np.uint8)
        if size <= COPY_ON_LOOP_BYTES_MAX:
            target[:] = source
        else:
            await self._copy_beside_loop(target, source, (chunk, offset))
        return ArenaRef(epoch=self._epoch, chunk=chunk, offset=offset, size=size)

    def _find(self, size: int) -> tuple[int, int] | None:
        if self._ended is not None:
            raise self._ended
        return self._allocator.allocate(size)

    async def _copy_beside_loop(
        self,
        target: _Bytes,
        source: _Bytes,
        place: tuple[int, int],
    ) -> None:
        copying = asyncio.get_running_loop().run_in_executor(None, np.copyto, target, source)
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            # The copy cannot be stopped: the place stays taken until it has ended.
            copying.add_done_callback(lambda _: self._free_place(*place))
            raise

    def free(self, ref: ArenaRef) -> None:
        self._free_place(ref.chunk, ref.offset)

    def _free_place(self, chunk: int, offset: int) -> None:
        self._allocator.free(chunk, offset)
        waiting, self._waiting_for_space = self._waiting_for_space, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _make_space(self, size: int) -> None:
        """Wait until the arena has changed in a way that may help."""
        if size > self._bytes_max:
            raise ResourceExhausted(
                f"a tensor of {size} bytes does not fit the input arena of {self._bytes_max} bytes"
            )
        loop = asyncio.get_running_loop()
        if self._growing is None:
            if self._allocator.total_bytes + size + ALIGNMENT_BYTES > self._bytes_max:
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
