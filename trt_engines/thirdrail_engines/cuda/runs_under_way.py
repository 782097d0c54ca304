# SPDX-License-Identifier: Apache-2.0
"""The runs of a device that threads wait for, and until when: nothing calls such a thread back."""

import contextlib
import threading
import time
from collections.abc import Iterator

from thirdrail_engines.engine import DeviceLost


def stuck(run_s_max: float) -> DeviceLost:
    return DeviceLost(f"the device was lost: a run has not ended within {run_s_max:g} s")


class RunsUnderWay:
    """For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[object, tuple[float, float]] = {}  # when each must be over, and its bound

    @contextlib.contextmanager
    def one(self, run_s_max: float) -> Iterator[None]:
        run = object()
        with self._lock:
            self._runs[run] = time.monotonic() + run_s_max, run_s_max
        try:
            yield
        finally:
            with self._lock:
                del self._runs[run]

    def check(self, now_s: float) -> None:
        """now_s: of time.monotonic(). Raises DeviceLost when one of them has not ended in time."""
        with self._lock:
            overdue = [run_s_max for end_s, run_s_max in self._runs.values() if end_s < now_s]
        if overdue:
            raise stuck(overdue[0])
