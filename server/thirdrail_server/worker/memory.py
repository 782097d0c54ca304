# SPDX-License-Identifier: Apache-2.0
"""How much memory a model version takes: the growth of the process's heap while it was loaded.

From before the load to after its warm-up, but never less than its files: weights that the engine
maps from there are not on the heap. Measured for models of 1 to 128 MiB: within 0.2 MiB of their
weights, and 0.1 MiB of it is left after an unload. What requests of other models allocate at that
moment is counted in. Under a memory budget the front loads one model at a time, so no other load
is; without one, loads that overlap count each other in, and nobody decides by the figure.

What a version holds only while it runs (activations, results) is not in it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from thirdrail_engines.malloc import heap_bytes
from thirdrail_server.repository.sizes import files_bytes

MS = 1_000_000  # nanoseconds


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


UNKNOWN = Measured(0, 0)


class Growth:
    """Of the heap, from now on."""

    def __init__(self) -> None:
        import onnxruntime  # noqa: F401  once 7 MiB, which no model is to blame for

        self._before = heap_bytes()

    def measured(self, folder: Path) -> Measured:
        """What the version took whose files lie in `folder`."""
        size = max(files_bytes(folder), heap_bytes() - self._before)
        return Measured(size, time.time_ns() // MS)
