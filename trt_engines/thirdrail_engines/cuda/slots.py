# SPDX-License-Identifier: Apache-2.0
"""Which instance takes the next run. Pure code but for the lock's waiting.

Each instance has a few slots: memory for one run from its first copy to its last. Two slots let
one run's inputs be copied in while another computes and a third's results are copied out.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Slot = TypeVar("Slot")


class SlotTable(Generic[Slot]):
    """slots: by instance. A run takes one and gives it back; it waits while all are taken.

    is_at_rest: whether the device has done what a slot's last run left it to do, which its thread
        may not have waited for. Such slots go first: who takes another has to wait for that.
    """

    def __init__(
        self,
        slots: Iterable[Iterable[Slot]],
        is_at_rest: Callable[[Slot], bool] = lambda slot: True,
    ) -> None:
        self._is_at_rest = is_at_rest
        self._free = [list(reversed(list(of_one))) for of_one in slots]
        self._counts = [len(free) for free in self._free]
        self._changed = threading.Condition()

    @contextmanager
    def taken(self) -> Iterator[Slot]:
        with self._changed:
            self._changed.wait_for(lambda: any(self._free))
            instance, slot = self._best()
            self._free[instance].remove(slot)
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

    def _best(self) -> tuple[int, Slot]:
        """Of the instance with the fewest runs; of equals the first, whose caches are warm. Within
        it the slot that was used last, for the same reason; where the device is busy with all of
        them, the one that was used first, which is done first."""
        at_rest = [list(filter(self._is_at_rest, free)) for free in self._free]

        def merit(index: int) -> tuple[int, int, int]:
            return len(at_rest[index]), len(self._free[index]), -index

        instance = max(range(len(self._free)), key=merit)
        return instance, at_rest[instance][-1] if at_rest[instance] else self._free[instance][0]
