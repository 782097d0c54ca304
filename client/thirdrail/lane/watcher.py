# SPDX-License-Identifier: Apache-2.0
"""The thread that reads a lane for those who wait elsewhere. It exists while there are any."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from thirdrail.lane.turns import Notice, Turns
from thirdrail.telling import run_foreign


class Watched(Protocol):
    @property
    def deadline_s(self) -> float | None:
        """On the monotonic clock; None: it never is overdue."""

    def on_overdue(self) -> None:
        """Its deadline has passed, and the worker has not even said so."""


class Watcher:
    """Of one lane.

    lock: the lane's; guards everything here.
    """

    def __init__(self, lock: threading.Lock, turns: Turns) -> None:
        self._lock = lock
        self._turns = turns
        self._watched: dict[Watched, float | None] = {}  # with their deadlines
        self._work: deque[Callable[[], None]] = deque()
        self._ticket = Notice()  # done when there is something to do
        self._thread: threading.Thread | None = None

    def watch(self, future: Watched) -> None:
        """Read until the future has left."""
        with self._lock:
            self._watched[future] = future.deadline_s
            if future.deadline_s is not None:
                self._turns.complete(self._ticket)  # it may be the first to be overdue
            self._start()

    def leave(self, future: Watched) -> None:
        """It has ended."""
        if future not in self._watched:
            return
        with self._lock:
            self._watched.pop(future, None)
            self._turns.complete(self._ticket)

    def run(self, work: Callable[[], None]) -> None:
        """Have the thread do something, which is foreign to us and may take long."""
        with self._lock:
            self._work.append(work)
            self._turns.complete(self._ticket)
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="thirdrail-watcher", daemon=True)
            thread.start()  # where there can be no more, whoever comes next tries again
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                ticket = self._ticket = Notice()
                work = self._work.popleft() if self._work else None
                if work is None and not self._watched:
                    self._thread = None
                    return
                ends_s = [each for each in self._watched.values() if each is not None]
                deadline_s = min(ends_s, default=None)
            if work is not None:
                run_foreign(work)
            else:
                self._turns.wait(ticket, deadline_s)
                self._end_overdue(time.monotonic())

    def _end_overdue(self, now_s: float) -> None:
        with self._lock:
            ends_s = self._watched.items()
            overdue = [each for each, end_s in ends_s if end_s is not None and end_s <= now_s]
            for future in overdue:
                del self._watched[future]
                self._work.append(future.on_overdue)
