# SPDX-License-Identifier: Apache-2.0
"""A stream to a server with several workers: one stream for each worker that its requests go to."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from thirdrail.errors import FailedPrecondition
from thirdrail.requests import InferOptions, Inputs, Result
from thirdrail.stream import NOT_ENTERED, OTHER_PROCESS, Stream

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.blocking import BlockingLane

LaneFor = Callable[[str], "BlockingLane | None"]  # of a model


class WorkerStreams(Stream):
    """What a stream promises holds for each: the bound of requests in flight, and the end."""

    def __init__(
        self, lane_for: LaneFor, stream_on: "Callable[[BlockingLane | None], Stream]"
    ) -> None:
        self._lane_for = lane_for
        self._stream_on = stream_on
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards the two below
        self._streams: dict[BlockingLane | None, Stream] | None = None
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._streams = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._streams = None
        self._entered.__exit__(kind, error, trace)

    def submit(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Future[Result]:
        """See `Stream.submit`."""
        if os.getpid() != self._pid:
            raise FailedPrecondition(OTHER_PROCESS)
        return self._on(self._lane_for(model)).submit(model, inputs, **options)

    def __repr__(self) -> str:
        streams = self._streams
        state = "closed" if streams is None else f"open on {len(streams)} lanes"
        return f"<Stream {state}>"

    def _on(self, lane: "BlockingLane | None") -> Stream:
        with self._lock:
            if self._streams is None:
                raise FailedPrecondition(NOT_ENTERED)
            stream = self._streams.get(lane)
            if stream is None:
                stream = self._entered.enter_context(self._stream_on(lane))
                self._streams[lane] = stream
            return stream
