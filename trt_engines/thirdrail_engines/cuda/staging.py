# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory to copy through, lent and given back, bounded in bytes.

The device copies from and to pinned memory by itself; of any other memory the driver copies a part
at a time and blocks. To pin memory takes milliseconds and stops the device, so blocks are kept, in
sizes that are powers of two. What does not fit into the bound is not pinned: then the caller
copies directly, which is slower and just as right.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from thirdrail_engines.cuda.device import Device, PinnedMemory
from thirdrail_engines.cuda.errors import OutOfDeviceMemory

BLOCK_BYTES_MIN = 4096


@dataclass(slots=True)
class StagingFigures:
    pinned_bytes: int = 0  # lent or kept
    lent_bytes: int = 0
    refused: int = 0  # times that somebody had to copy without


def block_bytes(nbytes: int) -> int:
    """The size of the block that `nbytes` are lent in."""
    return max(BLOCK_BYTES_MIN, 1 << (nbytes - 1).bit_length())


class PinnedPool:
    """Used from any thread. bytes_max: of all blocks together; 0 for none at all."""

    def __init__(self, device: Device, bytes_max: int) -> None:
        self._device = device
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, PinnedMemory] = OrderedDict()  # by address, the oldest first
        self._figures = StagingFigures()

    def lend(self, nbytes: int) -> PinnedMemory | None:
        """A block of at least `nbytes`; None when it would not fit."""
        size = block_bytes(nbytes)
        with self._lock:
            block = self._kept_of(size) or self._new(size)
            if block is None:
                self._figures.refused += 1
            else:
                self._figures.lent_bytes += size
            return block

    def give_back(self, block: PinnedMemory) -> None:
        """Nothing may be under way with it."""
        with self._lock:
            self._figures.lent_bytes -= block.view.nbytes
            self._kept[block.address] = block

    @property
    def figures(self) -> StagingFigures:
        with self._lock:
            figures = self._figures
            return StagingFigures(figures.pinned_bytes, figures.lent_bytes, figures.refused)

    def close(self) -> None:
        """All blocks are back."""
        with self._lock:
            assert not self._figures.lent_bytes, "staging memory is still lent"
            while self._kept:
                self._drop_oldest()

    def _kept_of(self, size: int) -> PinnedMemory | None:
        # The one that was used last is the one that caches may still hold.
        for address in reversed(self._kept):
            if self._kept[address].view.nbytes == size:
                return self._kept.pop(address)
        return None

    def _new(self, size: int) -> PinnedMemory | None:
        if self._figures.lent_bytes + size > self._bytes_max:
            return None
        while self._figures.pinned_bytes + size > self._bytes_max:
            self._drop_oldest()
        try:
            block = self._device.allocate_pinned(size)
        except OutOfDeviceMemory:
            return None
        self._figures.pinned_bytes += size
        return block

    def _drop_oldest(self) -> None:
        _, block = self._kept.popitem(last=False)
        self._figures.pinned_bytes -= block.view.nbytes
        self._device.free_pinned(block)
