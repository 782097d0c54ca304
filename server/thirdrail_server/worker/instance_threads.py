# SPDX-License-Identifier: Apache-2.0
"""The threads that run a model version's batches, one for each instance."""

import queue
import threading
from collections.abc import Callable

Work = Callable[[], None]


class InstanceThreads:
    """Runs work in the order in which it is given, on at most `count` threads at once."""

    def __init__(self, name: str, count: int) -> None:
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._alive = count
        self._on_ended: Work | None = None
        for number in range(count):
            thread = threading.Thread(target=self._run, name=f"{name}#{number}", daemon=True)
            thread.start()

    def give(self, work: Work) -> None:
        """`work` must not raise."""
        self._work.put(work)

    def close(self, on_ended: Work) -> None:
        """Finish what was given, then end; the last thread calls `on_ended`. Does not block: a run
        may take for ever."""
        self._on_ended = on_ended
        for _ in range(self._alive):
            self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds a session's memory, which must not wait for the next work to come
        with self._lock:
            self._alive -= 1
            is_last = not self._alive
        if is_last and self._on_ended is not None:
            self._on_ended()
