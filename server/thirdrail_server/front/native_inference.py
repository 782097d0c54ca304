# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1.Inference: unary calls and streams, from gRPC to the dispatcher and back.

Messages come and go as bytes: a small request is sent on to the worker as it came, with a few
fields appended, since in protobuf's wire format the last value of a field counts.
"""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

import asyncio
import itertools
import logging
import zlib
from collections.abc import AsyncIterator

import grpc

from thirdrail.errors import (
    Cancelled,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
    error_of_reason,
)
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.front.dispatch import Cancel, Dispatcher, Result
from thirdrail_server.front.handlers import service_handler
from thirdrail_server.front.native_messages import (
    limit_time,
    parsed_request,
    parsed_stream_request,
    refuse_references,
    request_alone,
    serialized,
    streamed,
    streamed_failure,
    take_raw,
)
from thirdrail_server.front.statuses import INTERNAL_TEXT, Context, abort_with
from thirdrail_server.front.wire import Large

log = logging.getLogger(__name__)

STOPPING_TEXT = "the server is shutting down and takes no new requests"
MODEL_IDS_MAX = 1024  # bound on one stream
_STREAM_FLOWS_FROM = 1 << 32  # above every number that a peer's address can hash to


class NativeInference:
    """The service's two methods. A gRPC server is given the `handler()`."""

    def __init__(self, dispatcher: Dispatcher, *, stream_requests_in_flight_max: int) -> None:
        self._dispatcher = dispatcher
        self._in_flight_max = stream_requests_in_flight_max
        self._stream_flows = itertools.count(_STREAM_FLOWS_FROM)
        self._stopping = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        service = pb.DESCRIPTOR.services_by_name["Inference"]
        return service_handler(service, self, of_bytes=("Infer", "InferStream"))

    def begin_stop(self) -> None:
        """Take no new requests; open streams answer what they have read, and end."""
        self._stopping.set()

    async def Infer(self, body: bytes, context: Context) -> bytes:
        try:
            if self._stopping.is_set():
                raise Unavailable(STOPPING_TEXT)
            request, large = parsed_request(body)
            if request.model_id:
                raise InvalidArgument("model_id means nothing in a unary call; use model_name")
            flow = zlib.crc32(context.peer().encode())
            result = await self.dispatch(body, request, large, context, flow)
            response = result.response
            response.call = request.call  # it has the one of the front's own lane
            if response.status.reason:
                raise error_of_reason(response.status.reason, response.status.message)
            return serialized(result)
        except ThirdrailError as error:
            await abort_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("Infer failed")
            await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)

    async def dispatch(
        self,
        body: bytes | None,
        request: pb.InferRequest,
        large: Large,
        context: Context,
        flow: int,
    ) -> Result:
        """body: the request's bytes where they can be sent on, None where they cannot."""
        refuse_references(request)
        suffix = limit_time(request, context.time_remaining())
        if body is not None and len(body) <= self._dispatcher.inline_bytes_max:
            return await self._dispatcher.infer_bytes(body + suffix, request, flow=flow)
        return await self._dispatcher.infer(request, take_raw(request, large), flow=flow)

    async def InferStream(self, bodies: AsyncIterator[bytes], context: Context) -> None:
        flow = next(self._stream_flows)
        stream = _Stream(self, self._dispatcher, context, self._in_flight_max, flow)
        try:
            await stream.run(bodies, self._stopping)
        except ThirdrailError as error:
            await abort_with(context, error)


class _Stream:
    """One InferStream: reads ahead up to the bound, answers in order of completion.

    A small request goes straight to the lane, and its answer straight to the one writer. Any other
    has a task that makes its answer. Either way the answer, or the word that it was cancelled, is
    made in one place: no call is answered twice or not at all.
    """

    def __init__(
        self,
        inference: NativeInference,
        dispatcher: Dispatcher,
        context: Context,
        in_flight_max: int,
        flow: int,
    ) -> None:
        self._inference = inference
        self._dispatcher = dispatcher
        self._context = context
        self._flow = flow
        self._room = asyncio.Semaphore(in_flight_max)
        self._calls: dict[int, Cancel] = {}
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: there are no more
        self._is_read = False
        self._is_over = False
        self._models: dict[int, tuple[str, int]] = {}

    async def run(self, bodies: AsyncIterator[bytes], stopping: asyncio.Event) -> None:
        """Until the caller has sent all and everything is answered. Raises what ends the stream."""
        reader = asyncio.create_task(self._read(bodies))
        reader.add_done_callback(self._on_read)
        stopper = asyncio.create_task(_cancel_on(stopping, reader))
        try:
            while (body := await self._answers.get()) is not None:
                await self._context.write(body)
                self._room.release()
            if reader.cancelled():
                raise Unavailable(STOPPING_TEXT)
            reader.result()
        finally:
            self._is_over = True
            for cancel in (reader.cancel, stopper.cancel, *self._calls.values()):
                cancel()

    async def _read(self, bodies: AsyncIterator[bytes]) -> None:
        await self._room.acquire()  # at the bound nothing is read: HTTP/2 holds the sender
        async for body in bodies:
            self._take(body, *parsed_stream_request(body))
            await self._room.acquire()

    def _on_read(self, reader: "asyncio.Task[None]") -> None:
        self._is_read = True
        has_failed = not reader.cancelled() and reader.exception() is not None
        if has_failed or not self._calls:
            self._answers.put_nowait(None)

    def _take(self, body: bytes, message: pb.InferStreamRequest, large: Large) -> None:
        kind = message.WhichOneof("message")
        if kind == "infer":
            request = message.infer
            if request.call in self._calls:
                raise InvalidArgument(f"call {request.call} is in flight already on this stream")
            # Ids are this stream's own: such a request is not sent on as it came.
            alone = None if request.model_id else request_alone(body)
            if alone is not None and len(alone) <= self._dispatcher.inline_bytes_max:
                return self._start(alone, request)
            task = asyncio.create_task(self._answer(request, large))
            self._calls[request.call] = task.cancel
            task.add_done_callback(lambda done: self._on_answer(request, done))
            return None
        self._room.release()
        if kind == "cancel":
            cancel = self._calls.get(message.cancel.call)
            if cancel is not None:
                cancel()
            return None
        raise InvalidArgument("a stream request holds neither 'infer' nor 'cancel'")

    def _start(self, body: bytes, request: pb.InferRequest) -> None:
        """Send a small request on as it came. body: the serialized request."""
        call, request_id = request.call, request.request_id

        def on_result(result: Result) -> None:
            del self._calls[call]
            if self._is_over:
                return result.release()
            result.response.call = call
            self._give(streamed(result))

        self._calls[call] = lambda: None
        try:
            refuse_references(request)
        except ThirdrailError as error:
            del self._calls[call]
            return self._give(streamed_failure(call, request_id, error))
        body += limit_time(request, self._context.time_remaining())
        cancel = self._dispatcher.start(body, request, on_result, flow=self._flow)
        if call in self._calls:  # else it has failed already
            self._calls[call] = cancel

    def _on_answer(self, request: pb.InferRequest, task: "asyncio.Task[bytes]") -> None:
        del self._calls[request.call]
        if task.cancelled():
            error = Cancelled("Request cancelled")
            self._give(streamed_failure(request.call, request.request_id, error))
        else:
            self._give(task.result())

    def _give(self, answer: bytes) -> None:
        self._answers.put_nowait(answer)
        if self._is_read and not self._calls:
            self._answers.put_nowait(None)

    async def _answer(self, request: pb.InferRequest, large: Large) -> bytes:
        call, request_id = request.call, request.request_id
        try:
            self._resolve_model(request)
            result = await self._inference.dispatch(None, request, large, self._context, self._flow)
            result.response.call = call
            return streamed(result)
        except ThirdrailError as error:
            return streamed_failure(call, request_id, error)
        except Exception:
            log.exception("a request of a stream failed", extra={"request_id": request_id})
            return streamed_failure(call, request_id, Internal(INTERNAL_TEXT))

    def _resolve_model(self, request: pb.InferRequest) -> None:
        """Ids are bound per stream here, since all streams share the front's one lane."""
        if not request.model_id:
            return
        if request.model_name:
            if len(self._models) >= MODEL_IDS_MAX and request.model_id not in self._models:
                raise ResourceExhausted(f"{MODEL_IDS_MAX} model ids are bound on this stream")
            self._models[request.model_id] = (request.model_name, request.model_version)
        elif request.model_id not in self._models:
            raise NotFound(f"model id {request.model_id} is not bound on this stream")
        request.model_name, request.model_version = self._models[request.model_id]
        request.model_id = 0


async def _cancel_on(event: asyncio.Event, task: "asyncio.Task[None]") -> None:
    await event.wait()
    task.cancel()
