# SPDX-License-Identifier: Apache-2.0
"""Futures of calls on a lane. Whoever asks one for its result reads the lane himself.

Somebody who only wants to be told (`add_done_callback`, `concurrent.futures.wait`, `as_completed`)
reads nothing: while there are such futures, and no longer, a watcher thread reads for them.

Foreign code never runs in a thread that has the lead, since it may wait for the lane itself. So a
reader settles a future only where nobody is to be told, and leaves the others to the watcher.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from thirdrail.errors import NotFound, ThirdrailError
from thirdrail.lane.calls import Call, timed_out
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail.weakly import weakly

if TYPE_CHECKING:
    from thirdrail.lane.blocking import BlockingLane

# From the worker's word to the server's.
WhyMissing = Callable[[NotFound], ThirdrailError]


class LaneFuture(Future[Result]):
    """The result of a call that `send` sends.

    timeout: of the request, in seconds.
    on_answer: told by the reader when the worker has ended the call, also a cancelled one.
    why_missing: asks the server about a model that the worker does not know, which takes a while.
    """

    def __init__(
        self,
        lane: "BlockingLane",
        *,
        borrow: bool,
        timeout: float | None,
        on_answer: "Callable[[LaneFuture], None] | None" = None,
        why_missing: WhyMissing | None = None,
    ) -> None:
        super().__init__()
        self._lane = lane
        self._on_answer = on_answer
        self._why_missing = why_missing
        self._timeout = timeout
        self.deadline_s = None if timeout is None else time.monotonic() + timeout
        self._is_taken = False  # somebody settles it; the future's condition guards both
        self._is_watched = False  # somebody is to be told
        self.call = Call(borrow=borrow, on_done=self._on_read)
        # wait and as_completed put themselves here: the only thing that they do to a future.
        self._waiters: list[Any] = _Waiters(weakly(self._watch))

    def send(self, options: bytes, arrays: Mapping[str, Array]) -> None:
        """Waits only while the lane has no room. Raises what `BlockingLane.start` raises."""
        self._lane.start(self.call, options, arrays, self.deadline_s, self._timeout)

    def result(self, timeout: float | None = None) -> Result:
        """Waits, reading the lane. Raises the request's error, CancelledError, and TimeoutError
        after `timeout` seconds of this wait, which do not end the request.
        """
        try:
            return super().result(self._drive(timeout))
        finally:
            del self  # an error has this frame, and we have the error: a cycle

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits as `result` does. Raises CancelledError and TimeoutError."""
        return super().exception(self._drive(timeout))

    def done(self) -> bool:
        """Whether it has ended, by what has come until now."""
        if not self._is_taken:
            if not self.call.is_done:
                self._lane.poll()
            if self.call.is_done:
                self._settle()
        return super().done()

    def cancel(self) -> bool:
        """Cancels the request in the server. False: it has ended already."""
        with self._condition:
            if self._is_taken:
                return self.cancelled()
            self._is_taken = True
        self._lane.abandon(self.call)
        self._lane.talk.watcher.leave(self)
        super().cancel()
        self.set_running_or_notify_cancel()  # tells those who wait for several
        return True

    def fail(self, error: ThirdrailError) -> None:
        """End with an error, and the request in the server, unless it has ended already."""
        with self._condition:
            if self._is_taken:
                return
            self._is_taken = True
        self._lane.abandon(self.call)
        self._lane.talk.watcher.leave(self)
        self.set_exception(error)

    def add_done_callback(self, fn: Callable[[Future[Result]], object]) -> None:
        """Has `fn(future)` called at the end: by another thread, or at once where it has ended."""
        self._watch()  # first, or the answer might be read in between, and told by who reads
        super().add_done_callback(fn)

    def _watch(self) -> None:
        with self._condition:
            if self._is_watched or super().done():
                return
            self._is_watched = True
            if self._is_taken:
                return  # whoever settles it tells
            if self.call.is_done:  # its answer was read, and nobody has asked what it means
                self._lane.talk.watcher.run(self._settle)
            else:
                self._lane.talk.watcher.watch(self)

    def _drive(self, timeout: float | None) -> float | None:
        """Read the lane until it has ended. Returns what is left of the timeout."""
        if self._is_taken:
            return timeout
        deadline_s = None if timeout is None else time.monotonic() + timeout
        deadlines = [each for each in (deadline_s, self.deadline_s) if each is not None]
        if self._lane.wait(self.call, min(deadlines, default=None)):
            self._settle()
        elif self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            self.on_overdue()
        return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())

    def on_overdue(self) -> None:
        """The worker has not even answered that the time is over."""
        self.fail(timed_out(self._timeout))

    def _on_read(self) -> None:
        """The response has come, to a thread that has the lead."""
        if self._on_answer is not None:
            self._on_answer(self)
        with self._condition:
            if self._is_watched:
                return self._lane.talk.watcher.run(self._settle)
            if self.call.is_not_found:
                return None  # whoever asks for the result asks the server as well
            is_ours, self._is_taken = not self._is_taken, True
        if not is_ours:
            return None
        finish = self._outcome()
        with self._condition:
            # Somebody may have come meanwhile; from here on nobody does.
            if self._has_watchers():
                self._lane.talk.watcher.run(finish)
            else:
                finish()

    def _has_watchers(self) -> bool:
        return self._is_watched

    def _settle(self) -> None:
        """End as the call has. Tells whoever is to be told."""
        with self._condition:
            if self._is_taken:
                return
            self._is_taken = True
        self._lane.talk.watcher.leave(
            self
        )  # before callbacks, which may raise what is no Exception
        self._outcome()()

    def _outcome(self) -> Callable[[], None]:
        """What ends the future."""
        try:
            result = self._ask_for_result()
        except BaseException as error:
            # Frames of ours have this future, and it would have them: a cycle that keeps the lane.
            error.__traceback__ = error.__context__ = None
            failure = error
            return lambda: self.set_exception(failure)
        return lambda: self.set_result(result)

    def _ask_for_result(self) -> Result:
        try:
            return self._lane.result_of(self.call)
        except NotFound as error:
            if self._why_missing is None:
                raise
            raise self._why_missing(error) from None


class _Waiters(list[Any]):
    """A future's list of those who wait for several, which says when it gets one."""

    def __init__(self, watch: Callable[[], None]) -> None:
        super().__init__()
        self._watch = watch

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._watch()
