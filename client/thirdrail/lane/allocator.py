# SPDX-License-Identifier: Apache-2.0
"""Where in an arena's chunks a tensor goes: first fit, neighbours merge when freed.

Pure bookkeeping on numbers, used by whoever manages an arena: the client for its input arena, the
worker for the output arena. Not thread-safe.
"""

from bisect import bisect_left, insort

ALIGNMENT_BYTES = 64  # a cache line; also what the widest vector loads of a CPU engine ask for


class ArenaAllocator:
    """Free and used pieces of a growing list of chunks."""

    def __init__(self) -> None:
        self._chunk_bytes: list[int] = []
        self._free: list[list[tuple[int, int]]] = []  # per chunk: (offset, size), by offset
        self._used: dict[tuple[int, int], int] = {}  # (chunk, offset) -> size

    @property
    def total_bytes(self) -> int:
        return sum(self._chunk_bytes)

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    @property
    def used_count(self) -> int:
        """How many pieces are allocated."""
        return len(self._used)

    @property
    def largest_free_bytes(self) -> int:
        """The largest piece that could be allocated now."""
        return max((size for free in self._free for _, size in free), default=0)

    def add_chunk(self, size: int) -> int:
        """A new chunk of `size` bytes, all free. Returns its number."""
        self._chunk_bytes.append(size)
        self._free.append([(0, size)])
        return len(self._chunk_bytes) - 1

    def allocate(self, size: int) -> tuple[int, int] | None:
        """(chunk, offset) of a free piece of `size` bytes or more; None where there is none."""
        needed = max(ALIGNMENT_BYTES, -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        for chunk, free in enumerate(self._free):
            for index, (offset, available) in enumerate(free):
                if available < needed:
                    continue
                if available == needed:
                    del free[index]
                else:
                    free[index] = (offset + needed, available - needed)
                self._used[chunk, offset] = needed
                return chunk, offset
        return None

    def free(self, chunk: int, offset: int) -> None:
        """Give a piece back. Raises KeyError where nothing is allocated at that place."""
        size = self._used.pop((chunk, offset))
        free = self._free[chunk]
        index = bisect_left(free, (offset, 0))
        if index < len(free) and free[index][0] == offset + size:
            size += free.pop(index)[1]
        if index > 0 and sum(free[index - 1]) == offset:
            offset, before = free.pop(index - 1)
            size += before
        insort(free, (offset, size))
