# SPDX-License-Identifier: Apache-2.0
"""Many requests on one stream, for threads: submits return futures, answers come in any order."""

import itertools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from thirdrail.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    ThirdrailError,
    Unavailable,
)
from thirdrail.failures import anew, rpc_errors, with_note
from thirdrail.requests import InferOptions, Inputs, Result, outcome_of_answer
from thirdrail.telling import Teller, ToldFuture
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc

IN_FLIGHT_MAX = 64

NOT_ENTERED = "enter the stream with `with` first"
OTHER_PROCESS = "a stream stays in the process that opened it"
UNANSWERED = "the server ended the stream without an answer"
LEFT = "the stream was left by an exception"

Write = Callable[[pb.InferRequest, str, Inputs, InferOptions], None]


class Stream:
    """A context manager. Leaving it waits for all answers; leaving it by an exception cancels them.

    Safe to use from several threads. A failed request is its future's exception and the stream goes
    on; when the stream itself fails, every future that is still open gets that error.
    """

    def __init__(
        self,
        inference: inference_pb2_grpc.InferenceStub,
        write: Write,
        *,
        address: str,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._inference = inference
        self._write = write
        self._address = address
        self._pid = os.getpid()
        self._teller = Teller()
        self._is_left = False  # by an exception
        self._room = threading.Semaphore(in_flight_max)
        self._lock = threading.Lock()  # guards the three below
        self._numbers = itertools.count(1)
        self._pending: dict[int, Future[Result]] = {}
        self._fault: ThirdrailError | None = FailedPrecondition(NOT_ENTERED)
        self._outgoing: queue.SimpleQueue[pb.InferStreamRequest | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        # gRPC takes the next message when HTTP/2 flow control lets the last one go.
        with rpc_errors(self._address):
            self._call: Any = self._inference.InferStream(iter(self._outgoing.get, None))
        self._fault = None
        self._reader = threading.Thread(target=self._read, name="thirdrail-stream", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._outgoing.put(None)
        else:
            self._leave()
        try:
            self._reader.join()
        except BaseException:
            self._leave()
            raise

    def submit(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Future[Result]:
        """Sends one request; waits while `in_flight_max` are unanswered.

        Takes the options of `Client.infer`. Cancelling the future cancels the request in the
        server. Raises InvalidArgument for inputs that cannot be sent, and the stream's own error
        once it has failed.
        """
        if os.getpid() != self._pid:
            raise FailedPrecondition(OTHER_PROCESS)
        message = pb.InferStreamRequest()
        self._write(message.infer, model, inputs, options)
        self._room.acquire()
        with self._lock:
            if self._fault is not None:
                self._room.release()
                raise anew(self._fault)
            call = message.infer.call = next(self._numbers)
            future = self._pending[call] = ToldFuture(self._teller, partial(self._cancel, call))
            self._outgoing.put(message)
        return future

    def __repr__(self) -> str:
        state = "closed" if self._fault else "open"
        return f"<Stream {self._address} {state}, {len(self._pending)} in flight>"

    def _leave(self) -> None:
        self._is_left = True
        self._call.cancel()

    def _cancel(self, call: int) -> None:
        self._outgoing.put(pb.InferStreamRequest(cancel=pb.Cancel(call=call)))

    def _read(self) -> None:
        try:
            with rpc_errors(self._address):
                for message in self._call:
                    self._take(message.infer)
            fault: ThirdrailError = FailedPrecondition("the stream is closed")
            unanswered: ThirdrailError = Unavailable(UNANSWERED)
        except ThirdrailError as error:
            unanswered = Cancelled(LEFT) if self._is_left else error
            fault = stream_ended(unanswered)
        self._end(fault, unanswered)

    def _take(self, answer: pb.InferResponse) -> None:
        with self._lock:
            future = self._pending.pop(answer.call, None)
        if future is None:
            return  # a later part of an answer that has already failed
        self._room.release()
        settle(future, outcome_of_answer(answer))

    def _end(self, fault: ThirdrailError, unanswered: ThirdrailError) -> None:
        with self._lock:
            self._fault = fault
            pending, self._pending = self._pending, {}
        self._outgoing.put(None)  # frees gRPC's sender
        for future in pending.values():
            self._room.release()
            settle(future, unanswered)


def settle(future: Future[Result], outcome: Result | ThirdrailError) -> None:
    """Ends the future, unless its owner cancelled it in this very moment."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Result):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)


def stream_ended(why: ThirdrailError) -> ThirdrailError:
    """For requests after what ended a stream; it does not begin again when a server is back."""
    return with_note(type(why)(f"this stream has ended, open another one: {why}"))


def require_room(in_flight_max: int) -> None:
    """Raises InvalidArgument where no request would ever be sent."""
    if in_flight_max < 1:
        raise InvalidArgument(f"in_flight_max must be 1 or more, got {in_flight_max}")
