# SPDX-License-Identifier: Apache-2.0
"""The thread that reads a lane for those who wait elsewhere. It exists while there are any."""

import threading
from collections import deque
from collections.abc import Callable

from thirdrail.lane.turns import Notice, Turns


class Watcher:
    """Of one lane.

    lock: the lane's; guards everything here.
    """

    def __init__(self, lock: threading.Lock, turns: Turns) -> None:
        self._lock = lock
        self._turns = turns
        self._watched: set[object] = set()
        self._work: deque[Callable[[], None]] = deque()
        self._ticket = Notice()  # done when there is something to do
        self._thread: threading.Thread | None = None

    def watch(self, future: object) -> None:
        """Read until the future has left."""
        with self._lock:
            self._watched.add(future)
            self._start()

    def leave(self, future: object) -> None:
        """It has ended."""
        if future not in self._watched:
            return
        with self._lock:
            self._watched.discard(future)
            self._turns.complete(self._ticket)

    def run(self, work: Callable[[], None]) -> None:
        """Have the thread do something, which is foreign to us and may take long."""
        with self._lock:
            self._work.append(work)
            self._turns.complete(self._ticket)
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="thirdrail-watcher", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                ticket = self._ticket = Notice()
                work = self._work.popleft() if self._work else None
                if work is None and not self._watched:
                    self._thread = None
                    return
            if work is not None:
                work()
            else:
                self._turns.wait(ticket, None)
