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
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}#{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def give(self, work: Work) -> None:
        """`work` must not raise."""
        self._work.put(work)

    def close(self) -> None:
        """Finish what was given, then end. Blocks until then."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
