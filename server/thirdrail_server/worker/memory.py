# SPDX-License-Identifier: Apache-2.0
"""How much memory a model version takes: the growth of the process's heap while it was loaded, or
for a worker with a device of its own, of what that has in use beside the memory that all models
compute in.

From before the load to after its warm-up, but never less than its files: weights that the engine
maps from there are not on the heap. Seen for models of 1 to 128 MiB: within 0.2 MiB of their
weights, and 0.1 MiB of it is left after an unload. Loads that overlap cannot be told apart; they
count as much as their files, which is the estimate. The time of a build does not count: another
process does that, and other loads go on meanwhile. What requests of other models allocate at that
moment is counted in, and what a version holds only while it runs (activations, results) is not.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from thirdrail_engines.malloc import heap_bytes
from thirdrail_engines.priming import prime_onnxruntime
from thirdrail_server.repository.sizes import files_bytes

MS = 1_000_000  # nanoseconds


class ModelTooLarge(Exception):
    """It was loaded, and takes more than it may. Nothing of it is left."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the model takes {size} bytes of memory")
        self.size = size  # bytes, measured


@dataclass(frozen=True, slots=True)
class Weight:
    """What a model version takes, and since when."""

    size: int = 0  # bytes
    loaded_ms: int = 0  # of the unix clock
    is_measured: bool = False  # else estimated from its files


UNKNOWN = Weight()


class Weighing:
    """Of one load, from now on."""

    def __init__(self, scale: "Scale") -> None:
        self._scale = scale
        self._before = scale.taken_bytes()
        self.is_alone = True

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Off the scale for a while: what others take meanwhile is not counted in."""
        grown = self._scale.taken_bytes() - self._before
        self._scale.over(self)
        try:
            yield
        finally:
            self._scale.put_on(self)
            self._before = self._scale.taken_bytes() - grown

    def end(self, folder: Path) -> Weight:
        """What the version took whose files lie in `folder`."""
        size, now_ms = files_bytes(folder), time.time_ns() // MS
        if not self.is_alone:
            return Weight(size, now_ms)
        grown = self._scale.taken_bytes() - self._before
        return Weight(max(size, grown), now_ms, is_measured=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._scale.over(self)


class Scale:
    """Of one process. Any thread may weigh.

    taken_bytes: what is in use now, of the memory that models are weighed in.
    """

    def __init__(self, taken_bytes: Callable[[], int] = heap_bytes) -> None:
        self.taken_bytes = taken_bytes
        self._lock = threading.Lock()
        self._weighings: set[Weighing] = set()
        self._is_primed = False

    def weigh(self) -> Weighing:
        """A context: `end` it within, and nobody else is in the way afterwards."""
        with self._lock:
            if not self._is_primed:
                prime_onnxruntime()
                self._is_primed = True
        weighing = Weighing(self)
        self.put_on(weighing)
        return weighing

    def put_on(self, weighing: Weighing) -> None:
        with self._lock:
            for other in self._weighings:
                other.is_alone = weighing.is_alone = False
            self._weighings.add(weighing)

    def over(self, weighing: Weighing) -> None:
        with self._lock:
            self._weighings.discard(weighing)
