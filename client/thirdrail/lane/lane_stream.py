# SPDX-License-Identifier: Apache-2.0
"""Many requests at once on a lane, with the methods of a stream over gRPC."""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from thirdrail.errors import Cancelled, FailedPrecondition, NotFound, ThirdrailError, Unavailable
from thirdrail.failures import anew
from thirdrail.lane.blocking import BlockingLane
from thirdrail.lane.calls import timed_out
from thirdrail.lane.futures import LaneFuture
from thirdrail.lane.turns import Notice
from thirdrail.requests import InferOptions, Inputs, Result
from thirdrail.stream import IN_FLIGHT_MAX, LEFT, NOT_ENTERED, OTHER_PROCESS, Stream, stream_ended
from thirdrail.tensors import Array

# A request without its inputs, and these.
Encode = Callable[[str, Inputs, InferOptions], tuple[bytes, Mapping[str, Array]]]
WhyMissing = Callable[[str, InferOptions, NotFound], ThirdrailError]  # see LaneFuture


class LaneStream(Stream):
    """A stream whose requests go over the lane. Room is given back by answers, also by those to
    cancelled requests: it counts what the worker holds.
    """

    def __init__(
        self,
        lane: BlockingLane,
        encode: Encode,
        why_missing: WhyMissing,
        *,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._lane = lane
        self._encode = encode
        self._why_missing = why_missing
        self._in_flight_max = in_flight_max
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the three below
        self._open: dict[LaneFuture, None] = {}
        self._answered = Notice()
        self._fault: ThirdrailError | None = FailedPrecondition(NOT_ENTERED)

    def __enter__(self) -> Self:
        self._fault = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._cancel_all()
        try:
            for future in list(self._open):
                if not self._lane.wait(future.call, future.deadline_s):
                    future.on_overdue()
        except BaseException:
            self._cancel_all()
            raise
        finally:
            self._fault = FailedPrecondition("the stream is closed")

    def submit(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Future[Result]:
        """See `Stream.submit`."""
        if os.getpid() != self._pid:
            raise FailedPrecondition(OTHER_PROCESS)
        head, arrays = self._encode(model, inputs, options)
        future = LaneFuture(
            self._lane,
            borrow=options.get("borrow", False),
            timeout=options.get("timeout"),
            on_answer=self._on_answer,
            why_missing=partial(self._why_missing, model, options),
        )
        self._take_room(future, options.get("timeout"))
        try:
            future.send(head, arrays)
        except BaseException:
            self._on_answer(future)
            raise
        return future

    def __repr__(self) -> str:
        state = "closed" if self._fault else "open"
        return f"<Stream on lane {self._lane.session} {state}, {len(self._open)} in flight>"

    def _take_room(self, future: LaneFuture, timeout: float | None) -> None:
        while True:
            with self._lock:
                if self._fault is None and self._lane.has_ended:
                    self._fault = stream_ended(Unavailable(self._lane.end_reason))
                if self._fault is not None:
                    raise anew(self._fault)
                if len(self._open) < self._in_flight_max:
                    self._open[future] = None
                    return
                answered = self._answered
            in_time = self._lane.wait(answered, future.deadline_s)
            if not in_time and not self._lane.has_ended:
                raise timed_out(timeout)

    def _on_answer(self, future: LaneFuture) -> None:
        with self._lock:
            self._open.pop(future, None)
            answered, self._answered = self._answered, Notice()
        self._lane.wake(answered)

    def _cancel_all(self) -> None:
        for future in list(self._open):
            future.fail(Cancelled(LEFT))
