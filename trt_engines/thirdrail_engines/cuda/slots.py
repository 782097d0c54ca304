# SPDX-License-Identifier: Apache-2.0
"""Which instance takes the next run. Pure code but for the lock's waiting.

Each instance has a few slots: memory for one run from its first copy to its last. Two slots let
one run's inputs be copied in while another computes and a third's results are copied out.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Slot = TypeVar("Slot")


class SlotTable(Generic[Slot]):
    """slots: by instance. A run takes one and gives it back; it waits while all are taken."""

    def __init__(self, slots: Iterable[Iterable[Slot]]) -> None:
        self._free = [list(reversed(list(of_one))) for of_one in slots]
        self._counts = [len(free) for free in self._free]
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[Slot]:
        with self._changed:
            self._changed.wait_for(lambda: any(self._free))
            instance = self._idlest()
            slot = self._free[instance].pop()
        try:
            yield slot
        finally:
            with self._changed:
                self._free[instance].append(slot)
                self._changed.notify()

    @property
    def busy(self) -> int:
        with self._changed:
            return sum(self._counts) - sum(map(len, self._free))

    def _idlest(self) -> int:
        """The instance with the fewest runs; of equals the first, whose caches are warm. Within it
        the slot that was used last, for the same reason."""
        return max(range(len(self._free)), key=lambda index: (len(self._free[index]), -index))
