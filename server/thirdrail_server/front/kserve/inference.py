# SPDX-License-Identifier: Apache-2.0
"""ModelInfer and ModelStreamInfer: a request through the dispatcher and back.

Messages come and go as bytes, because large tensors do not pass through protobuf, see wire.py.
"""

import asyncio
import itertools
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any, Protocol

from thirdrail.errors import Internal, ThirdrailError, Unavailable
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.dispatch import Dispatcher, Result
from thirdrail_server.front.kserve import responses
from thirdrail_server.front.kserve.region_outputs import written_to_regions
from thirdrail_server.front.kserve.regions import RegionRegistry, RequestRegions
from thirdrail_server.front.kserve.requests import Data, native_request, parsed_request
from thirdrail_server.front.kserve.status import INTERNAL_TEXT, Context, error_of, named
from thirdrail_server.front.kserve.stream import StreamCut, replies_in_order
from thirdrail_server.front.wire import Large
from thirdrail_server.inference import grpc_service_pb2 as pb

_log = logging.getLogger(__name__)

_STOPPING_TEXT = "GRPC server is shutting down and has stopped accepting new requests."
_STATUS_ON_ERROR_HEADER = "triton_grpc_error"
_STREAM_FLOWS_FROM = 1 << 32  # above every number that a peer's address can hash to

StreamAnswer = Callable[[bytes], Coroutine[Any, Any, bytes]]


class Serialized(Protocol):
    """How a call puts a response that succeeded into bytes."""

    def __call__(
        self, response: inference_pb2.InferResponse, data: responses.Data, *, request_id: str
    ) -> bytes: ...


class InferenceCalls:
    """Runs the inference calls of one server until it is told to stop."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        registry: RegionRegistry,
        *,
        stream_requests_in_flight_max: int,
    ) -> None:
        self._dispatcher = dispatcher
        self._registry = registry
        self._in_flight_max = stream_requests_in_flight_max
        self._stream_flows = itertools.count(_STREAM_FLOWS_FROM)
        self._stop = asyncio.Event()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def begin_stop(self) -> None:
        """Refuses new requests from now on; open streams answer what they have read, and end."""
        self._stop.set()

    async def unary(self, body: bytes, context: Context) -> bytes:
        """The reply to a ModelInferRequest. Raises ThirdrailError alone."""
        if self.is_stopping:
            raise Unavailable(_STOPPING_TEXT)
        request, large = parsed_request(body)
        # Their connection is all that tells unary callers apart.
        flow = zlib.crc32(context.peer().encode())
        return await self._infer(request, large, context, flow, responses.unary_reply)

    async def stream(self, bodies: AsyncIterator[bytes], context: Context) -> None:
        """Writes the replies to the stream. Raises what ends it with a status other than OK."""
        replies = replies_in_order(
            bodies,
            self._stream_answer(context),
            in_flight_max=self._in_flight_max,
            stop=self._stop,
        )
        try:
            async with aclosing(replies):
                async for reply in replies:
                    await context.write(reply)
        except StreamCut:
            raise Unavailable(_STOPPING_TEXT) from None

    def _stream_answer(self, context: Context) -> StreamAnswer:
        flow = next(self._stream_flows)
        ends_on_error = _wants_status_on_error(context)

        async def answer(request: pb.ModelInferRequest, large: Large) -> bytes:
            try:
                return await self._infer(request, large, context, flow, responses.stream_reply)
            except ThirdrailError as error:
                if ends_on_error:
                    raise
                return responses.stream_error(error, request_id=request.id)

        # What is no request at all has no id to answer to: it ends the stream, where it is read.
        return lambda body: answer(*parsed_request(body))

    async def _infer(
        self,
        request: pb.ModelInferRequest,
        large: Large,
        context: Context,
        flow: int,
        serialized: Serialized,
    ) -> bytes:
        """The reply. Raises ThirdrailError alone."""
        with ExitStack() as held:  # what is given back when nobody reads or writes it any more
            regions = RequestRegions(self._registry)
            held.callback(regions.end)
            try:
                native, data = native_request(
                    request, large, regions=regions, time_left_us=_time_left_us(context)
                )
                result = await self._result(native, data, flow, regions)
                held.callback(result.release)
                response = result.response
                if response.status.reason != inference_pb2.REASON_UNSPECIFIED:
                    raise error_of(response.status)
                outputs: responses.Data = result.data
                if regions.targets:
                    outputs = await written_to_regions(result, regions.targets, held)
                return serialized(response, outputs, request_id=request.id)
            except ThirdrailError as error:
                raise named(error, request.id) from None
            except Exception:
                _log.exception("request '%s' to model '%s' failed", request.id, request.model_name)
                raise Internal(INTERNAL_TEXT) from None

    async def _result(
        self, request: inference_pb2.InferRequest, data: Data, flow: int, regions: RequestRegions
    ) -> Result:
        worker = regions.worker
        if not worker:
            return await self._dispatcher.infer(request, data, flow=flow)
        await regions.open_again()
        return await self._dispatcher.infer_on(worker, request, data, flow=flow)


def _time_left_us(context: Context) -> int | None:
    seconds = context.time_remaining()
    return None if seconds is None else int(seconds * 1e6)


def _wants_status_on_error(context: Context) -> bool:
    return any(
        key == _STATUS_ON_ERROR_HEADER and value in ("true", b"true")
        for key, value in context.invocation_metadata() or ()
    )
