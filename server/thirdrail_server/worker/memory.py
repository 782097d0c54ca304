# SPDX-License-Identifier: Apache-2.0
"""How much memory a model version takes: the growth of the process's heap while it was loaded.

From before the load to after its warm-up, but never less than its files: weights that the engine
maps from there are not on the heap. Measured for models of 1 to 128 MiB: within 0.2 MiB of their
weights, and 0.1 MiB of it is left after an unload. What requests of other models allocate at that
moment is counted in. Under a memory budget the front loads one model at a time, so no other load
is; without one, loads that overlap count each other in, and nobody decides by the figure.

What a version holds only while it runs (activations, results) is not in it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from thirdrail_engines.malloc import heap_bytes

FILES_MAX = 10_000

T = TypeVar("T")


class ModelTooLarge(Exception):
    """It was loaded, and takes more than it may. Nothing of it is left."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the model takes {size} bytes of memory")
        self.size = size  # bytes, measured


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model version takes, and since when."""

    size: int  # bytes
    loaded_ms: int  # of the unix clock


def measured(load: Callable[[], T], path: Path) -> tuple[T, Measured]:
    """Load a version, whose model file lies at `path`, and say what that took."""
    import onnxruntime  # noqa: F401  once 7 MiB, which no model is to blame for

    before = heap_bytes()
    loaded = load()
    size = max(files_bytes(path.parent), heap_bytes() - before)
    return loaded, Measured(size, time.time_ns() // 1_000_000)


def files_bytes(folder: Path) -> int:
    """The size of all files of a version: its model and the weights beside it. What cannot be read
    counts as nothing: the load will say so."""
    total = files = 0
    for parent, _folders, names in os.walk(folder):
        for name in names:
            files += 1
            if files > FILES_MAX:
                return total
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
