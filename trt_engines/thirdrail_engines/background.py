# SPDX-License-Identifier: Apache-2.0
"""Work that nobody waits for, on a thread that gives way to all who are waited for."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

NICENESS = 19


def in_background(work: Callable[[], T]) -> T:
    """Run it on a thread of its own with the lowest priority. Returns and raises as it does.

    On Linux each thread has a priority, which the threads and processes that it starts inherit
    (sched(7)), so a session that is opened in here computes like that too. Without privileges
    nobody gets his priority back: so the thread ends with the work.
    """
    with ThreadPoolExecutor(1, "background", initializer=_step_back) as thread:
        return thread.submit(work).result()


def _step_back() -> None:
    with contextlib.suppress(OSError, AttributeError):  # elsewhere it is a thread like others
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
