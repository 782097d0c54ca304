# SPDX-License-Identifier: Apache-2.0
"""Many requests on one stream, for asyncio: submits return tasks, answers come in any order."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from thirdrail.errors import Cancelled, FailedPrecondition, ThirdrailError, Unavailable
from thirdrail.failures import anew, rpc_errors
from thirdrail.requests import InferOptions, Inputs, Result, outcome_of_answer
from thirdrail.stream import IN_FLIGHT_MAX, LEFT, UNANSWERED, stream_ended
from thirdrail.v1 import inference_pb2 as pb

if TYPE_CHECKING:  # the asynchronous stub exists for the type checker only
    from thirdrail.v1.inference_pb2_grpc import InferenceAsyncStub

AsyncWrite = Callable[[pb.InferRequest, str, Inputs, InferOptions], Awaitable[None]]

ASYNC_NOT_ENTERED = "enter the stream with `async with` first"


class AsyncStream:
    """A context manager. Leaving it waits for all answers; leaving it by an exception cancels them.

    A failed request is its task's exception and the stream goes on; when the stream itself fails,
    every task that is still open gets that error.
    """

    def __init__(
        self,
        inference: "InferenceAsyncStub",
        write: AsyncWrite,
        *,
        address: str,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._inference = inference
        self._write = write
        self._address = address
        self._room = asyncio.Semaphore(in_flight_max)
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Result]] = {}
        self._tasks: set[asyncio.Task[Result]] = set()
        self._fault: ThirdrailError | None = FailedPrecondition(ASYNC_NOT_ENTERED)
        self._outgoing: asyncio.Queue[pb.InferStreamRequest | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        with rpc_errors(self._address):
            self._call: Any = self._inference.InferStream(self._messages())
        self._fault = None
        self._reader = asyncio.create_task(self._read(), name="thirdrail-stream")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                await all_ended(self._tasks)
                self._outgoing.put_nowait(None)
                await asyncio.shield(self._reader)
        finally:
            for task in self._tasks:
                task.cancel()
            self._call.cancel()
            await self._reader

    def submit(
        self, model: str, inputs: Inputs, **options: Unpack[InferOptions]
    ) -> asyncio.Task[Result]:
        """Sends one request; it waits in its task while `in_flight_max` are unanswered.

        Takes the options of `AsyncClient.infer`. Cancelling the task cancels the request in the
        server. The task raises InvalidArgument for inputs that cannot be sent. Raises the stream's
        own error once it has failed.
        """
        if self._fault is not None:
            raise anew(self._fault)
        task = asyncio.create_task(self._infer(model, inputs, options))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __repr__(self) -> str:
        state = "closed" if self._fault else "open"
        return f"<AsyncStream {self._address} {state}, {len(self._pending)} in flight>"

    async def _infer(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        message = pb.InferStreamRequest()
        await self._write(message.infer, model, inputs, options)
        await self._room.acquire()
        if self._fault is not None:
            self._room.release()
            raise anew(self._fault)
        call = message.infer.call = next(self._numbers)
        # The room is given back by the answer, which also follows a cancel: it counts what the
        # server holds.
        future = self._pending[call] = _new_future()
        self._outgoing.put_nowait(message)
        try:
            return await future
        except asyncio.CancelledError:
            self._outgoing.put_nowait(pb.InferStreamRequest(cancel=pb.Cancel(call=call)))
            raise

    async def _messages(self) -> AsyncIterator[pb.InferStreamRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self) -> None:
        try:
            with rpc_errors(self._address):
                async for message in self._call:
                    self._take(message.infer)
            fault: ThirdrailError = FailedPrecondition("the stream is closed")
            unanswered: ThirdrailError = Unavailable(UNANSWERED)
        except ThirdrailError as error:
            fault, unanswered = stream_ended(error), error
        except asyncio.CancelledError:  # how grpc.aio reports that we cancelled the call
            fault = unanswered = Cancelled(LEFT)
        self._fault = fault
        pending, self._pending = self._pending, {}
        for future in pending.values():
            self._room.release()
            _settle(future, unanswered)

    def _take(self, answer: pb.InferResponse) -> None:
        future = self._pending.pop(answer.call, None)
        if future is None:
            return  # a later part of an answer that has already failed
        self._room.release()
        _settle(future, outcome_of_answer(answer))


def _new_future() -> asyncio.Future[Result]:
    return asyncio.get_running_loop().create_future()


async def all_ended(tasks: set[asyncio.Task[Result]]) -> None:
    """Until the set is empty: each task leaves it at its end."""
    while tasks:
        await asyncio.wait(tasks)


def _settle(future: asyncio.Future[Result], outcome: Result | ThirdrailError) -> None:
    if future.done():  # its task was cancelled
        return
    if isinstance(outcome, Result):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
