# SPDX-License-Identifier: Apache-2.0
"""Futures whose callbacks run on a thread of their own, and not on the one that takes answers in.

What a callback does is foreign to us: it may wait for another answer, and would for ever on the
thread that brings it. Whoever waits in `result`, `wait` or `as_completed` needs no such thread.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from thirdrail.requests import Result


class Teller:
    """Runs what it is given, one after the other, on a thread that exists while there is any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._work: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._work.append(work)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="thirdrail-teller", daemon=True)
                thread.start()  # where there can be no more, whoever comes next tries again
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._thread = None
                    return
                work = self._work.popleft()
            run_foreign(work)


class ToldFuture(Future[Result]):
    """A future over gRPC.

    teller: runs the callbacks.
    on_cancel: called by whoever cancels it.
    """

    def __init__(self, teller: Teller, on_cancel: Callable[[], object]) -> None:
        super().__init__()
        self._teller = teller
        super().add_done_callback(lambda done: on_cancel() if done.cancelled() else None)

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        """Has `fn(future)` called at the end: by another thread, or at once where it has ended."""
        call = partial(super().add_done_callback, fn)  # at the end, that is a call at once
        if self.done():
            call()
        else:
            super().add_done_callback(lambda _: self._teller.run(call))


def run_foreign(work: Callable[[], object]) -> None:
    """What a callback raises would end a thread of its own; this one has others to tell."""
    try:
        work()
    except BaseException:
        failure = (*sys.exc_info(), threading.current_thread())
        threading.excepthook(threading.ExceptHookArgs(failure))
