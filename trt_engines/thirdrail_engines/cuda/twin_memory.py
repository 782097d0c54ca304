# SPDX-License-Identifier: Apache-2.0
"""The twin's memory: allocations by address, with the bounds that a device has."""

import threading
from bisect import bisect_right

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES, PinnedMemory
from thirdrail_engines.cuda.errors import error_of


class Room:
    """Allocations by address, and how much they may take together."""

    def __init__(self, what: str, bytes_max: int) -> None:
        self._what = what
        self.bytes_max = bytes_max
        self._taken: dict[int, PinnedMemory] = {}
        self._starts: list[int] = []
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return self.bytes_max - sum(memory.view.nbytes for memory in self._taken.values())

    @property
    def leftovers(self) -> str:
        return f"{len(self._taken)} pieces of {self._what} memory" if self._taken else ""

    def take(self, nbytes: int, call: str) -> PinnedMemory:
        if nbytes < 1:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        if nbytes > self.free_bytes:
            raise error_of("CUDA_ERROR_OUT_OF_MEMORY", call)
        # What was there before is garbage on a GPU as well.
        whole = np.full(nbytes + ALIGNMENT_BYTES, 0xA5, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT_BYTES
        view = whole[start : start + nbytes]
        return self._keep(PinnedMemory(view.ctypes.data, view))

    def adopt(self, memory: PinnedMemory, call: str) -> None:
        """Memory that was made elsewhere counts as taken here."""
        if memory.view.nbytes > self.free_bytes:
            raise error_of("CUDA_ERROR_OUT_OF_MEMORY", call)
        self._keep(memory)

    def let_go(self, address: int) -> None:
        """Of what was adopted; what it holds stays as it is, for others may have it."""
        with self._lock:
            del self._taken[address]
            self._starts = sorted(self._taken)

    def _keep(self, memory: PinnedMemory) -> PinnedMemory:
        with self._lock:
            self._taken[memory.address] = memory
            self._starts = sorted(self._taken)
        return memory

    def give_back(self, address: int, call: str) -> None:
        with self._lock:
            memory = self._taken.pop(address, None)
            self._starts = sorted(self._taken)
        if memory is None:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        memory.view[:] = 0x5A  # whoever still reads it is to notice

    def bytes_at(self, address: int, nbytes: int, call: str) -> Array:
        with self._lock:
            index = bisect_right(self._starts, address) - 1
            memory = self._taken[self._starts[index]] if index >= 0 else None
        if memory is None or address + nbytes > memory.address + memory.view.nbytes:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        offset = address - memory.address
        return memory.view[offset : offset + nbytes]
