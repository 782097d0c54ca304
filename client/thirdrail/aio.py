# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio, the twin of `client.Client`: the same methods, to be awaited."""

import asyncio
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from thirdrail.aio_connection import AsyncConnection, require_no_fork
from thirdrail.aio_lane_choice import AsyncLaneChoice
from thirdrail.aio_stream import AsyncStream
from thirdrail.channels import Compression, TlsOptions, grpc_compression, open_aio_channel
from thirdrail.device.aio_device import AsyncDevice
from thirdrail.discovery import find_address, url_of
from thirdrail.dtypes import extent
from thirdrail.errors import FailedPrecondition, InvalidArgument, NotFound
from thirdrail.failures import IS_CLOSED, rpc_errors
from thirdrail.lane.aio_lane_stream import AsyncLaneStream
from thirdrail.lane.calls import NotSent, timed_out
from thirdrail.lane.encoding import Encoder
from thirdrail.models import DescriptionCache
from thirdrail.requests import (
    InferOptions,
    Inputs,
    Result,
    named_arrays,
    outcome_of_response,
    write_request,
)
from thirdrail.stream import IN_FLIGHT_MAX, require_room
from thirdrail.tensors import Array
from thirdrail.transport import (
    LIFETIME_S,
    NOTHING_YET,
    LaneRule,
    Transport,
    TransportChoice,
    needs_lane,
)
from thirdrail.v1 import inference_pb2

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.aio_exports import AsyncExport
    from thirdrail.lane.aio_session import AsyncSession
    from thirdrail.lane.exports import SharedTensor

__all__ = ["AsyncClient", "AsyncDevice"]


class AsyncClient(AsyncLaneChoice):
    """Calls the models of a Thirdrail server from asyncio.

    Takes the arguments of `Client`, and raises what it raises. Use it in one event loop at a time,
    and in a forked child only when every AsyncClient of the parent was closed before the fork.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        tls: TlsOptions | None = None,
        compression: Compression | None = None,
        transport: TransportChoice = "auto",
        debug: bool = False,
    ) -> None:
        super().__init__()
        self._url = url_of(url)
        self._tls = tls
        self._compression = grpc_compression(compression)
        self._rule = LaneRule(transport)
        self._is_debug = debug
        self._is_closed = False
        self._connection: AsyncConnection | None = None
        self._encoder = Encoder()

    async def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """Runs a model once and waits for its outputs.

        inputs: a mapping from input names to tensors; a model with one input also takes its tensor
            alone. Arrays (numpy, anything with __array__, __dlpack__ or the buffer protocol) are
            sent as they are; lists, numbers, str and bytes are converted to the model's type.

        Options:
            outputs: names of the outputs wanted; all by default.
            version: of the model; the newest that is ready by default.
            request_id: given back in the result and written to the server's log.
            timeout: seconds after which TimedOut is raised; none by default. Getting onto the lane
                and asking for the model's declaration, where that has to be, come before.
            priority: 1 is the highest; the model's own by default.
            parameters: a mapping of bool, int, float or str.
            classes: the best N classes as b"value:index[:label]" instead of each output.
            borrow: over the lane, the arrays are views of the server's memory, which the result
                holds until it is released, left as a context manager, or all of them are gone.
        """
        began_ns = time.monotonic_ns()
        try:
            return await self._infer(model, inputs, options)
        except InvalidArgument:
            if not self._was_outdated(model, inputs, options, began_ns):
                raise
        return await self._infer(model, inputs, options)

    async def _infer(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        session = await self._session_for(model)
        if session is not None:
            try:
                return await self._infer_over_lane(session, model, inputs, options)
            except NotSent:  # the session has ended meanwhile, and the worker knows of no call
                session = await self._session_for(model)
        if session is not None:
            return await self._infer_over_lane(session, model, inputs, options)
        return await self._infer_over_grpc(model, inputs, options)

    def submit(
        self, model: str, inputs: Inputs, **options: Unpack[InferOptions]
    ) -> asyncio.Task[Result]:
        """`infer` as a task. Cancelling the task cancels the request in the server.

        Nothing but the limits of the lane, or over gRPC of the server, bounds how many are in
        flight, with ResourceExhausted; `stream` does.
        """
        return asyncio.create_task(self.infer(model, inputs, **options))

    def stream(self, *, in_flight_max: int = IN_FLIGHT_MAX) -> AsyncStream:
        """A stream for many requests to any models: `async with client.stream() as stream:`.

        in_flight_max: so many wait for their answers at most, then `submit` waits; 1 or more.
        """
        require_room(in_flight_max)
        connection = self._connected()
        return AsyncLaneStream(
            connection.access,
            self._infer_in_stream,
            connection.inference,
            self._write,
            address=connection.address,
            in_flight_max=in_flight_max,
        )

    async def empty(
        self,
        shape: Sequence[int] | int,
        dtype: npt.DTypeLike = np.float32,
        *,
        shared: bool = False,
    ) -> Array:
        """An array to fill in and pass to `infer`, which then sends it without a copy.

        Over the lane it lies in shared memory, which goes back when the last view of it is gone.
        Do not write it while a request reads it.

        dtype: numpy's, or a name such as "FP32".
        shared: in memory of its own, which can be exported to another process.
        Raises InvalidArgument for what no array has, ResourceExhausted when the server gives no
        more memory.
        """
        session = await self._connected().access.session()
        if session is None:
            return np.empty(*extent(shape, dtype)[:2])
        return await session.empty(shape, dtype, alone=shared)

    async def export(
        self, tensor: Any, *, uid: int | None = None, lifetime: float = LIFETIME_S
    ) -> "AsyncExport":
        """Lets another process on this host have a tensor: pass the `token` of what this returns to
        its `receive`, by whatever means.

        An array of `empty(..., shared=True)`, whole, and one that was received are handed over
        where they lie; a borrowed result, and any other array, is copied once. The tensor must not
        be written any more: an array that is exported where it lies becomes read-only.

        uid: the user that may receive it, our own by default.
        lifetime: seconds until it must have been received; of more than an hour, one hour counts.
        Raises FailedPrecondition without the lane, InvalidArgument for what is no array of numbers,
        ResourceExhausted when too much is shared already.
        """
        return await (await self._lane_session()).exports.export(tensor, uid, lifetime)

    async def receive(self, token: str) -> "SharedTensor":
        """The tensor that another process has exported, mapped and not copied.

        Raises FailedPrecondition without the lane and for a token that is used up, expired, revoked
        or unknown, PermissionDenied where it is for another user.
        """
        return await (await self._lane_session()).exports.receive(token)

    async def _lane_session(self) -> "AsyncSession":
        """Raises FailedPrecondition where there is no lane."""
        session = await self._connected().access.session()
        if session is None:
            raise FailedPrecondition(needs_lane(self.transport))
        return session

    @property
    def transport(self) -> Transport:
        """What calls travel on, and why not on the lane."""
        return NOTHING_YET if self._connection is None else self._connection.lanes.transport

    async def close(self) -> None:
        """Closes the connection; calls in flight end with Cancelled. May be called twice."""
        self._is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickled or copied, it is a client of its own with the same settings."""
        anew = {"_connection": None, "_encoder": Encoder(), "_descriptions": DescriptionCache()}
        return self.__dict__ | anew | {"_rule": LaneRule(self._rule.choice)}

    def __repr__(self) -> str:
        if self._connection is not None:
            return f"<AsyncClient {self._connection.address} open>"
        state = "closed" if self._is_closed else "not connected"
        return f"<AsyncClient {self._url or 'local'} {state}>"

    def _connected(self) -> AsyncConnection:
        connection = self._connection
        if connection is not None and connection.is_ours:
            return connection
        return self._connect()

    def _connect(self) -> AsyncConnection:
        if self._is_closed:
            raise FailedPrecondition(IS_CLOSED)
        if self._connection is not None:
            self._connection.forget()
        require_no_fork()
        address = find_address(self._url, sockets=self._tls is None)
        channel = open_aio_channel(address, self._tls, self._compression)
        self._connection = AsyncConnection(address, channel, self._rule, is_debug=self._is_debug)
        return self._connection

    async def _infer_over_lane(
        self, session: "AsyncSession", model: str, inputs: Inputs, options: InferOptions
    ) -> Result:
        try:
            return await self._infer_on(session, model, inputs, options)
        except NotFound as error:
            if not self._connected().lanes.forget(model):
                raise await self._why_missing(model, options, error) from None
        where_it_is_now = await self._session_for(model)
        if where_it_is_now is None:
            return await self._infer_over_grpc(model, inputs, options)
        try:
            return await self._infer_on(where_it_is_now, model, inputs, options)
        except NotFound as error:
            raise await self._why_missing(model, options, error) from None

    async def _infer_on(
        self, session: "AsyncSession", model: str, inputs: Inputs, options: InferOptions
    ) -> Result:
        description = await self._needed_description(model, inputs, options)
        head = self._encoder.options(model, description, options)
        arrays = named_arrays(inputs, description)
        timeout, borrow = options.get("timeout"), options.get("borrow", False)
        try:
            async with asyncio.timeout(timeout):
                return await session.infer(head, arrays, self._encoder, borrow=borrow)
        except TimeoutError:
            raise timed_out(timeout) from None

    async def _infer_in_stream(
        self, session: "AsyncSession", model: str, inputs: Inputs, options: InferOptions
    ) -> Result:
        """session: that with the server's first worker."""
        if self._connected().lanes.are_several:
            return await self.infer(model, inputs, **options)
        return await self._infer_over_lane(session, model, inputs, options)

    async def _infer_over_grpc(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        request = inference_pb2.InferRequest()
        await self._write(request, model, inputs, options)
        connection, timeout = self._connected(), options.get("timeout")
        with rpc_errors(connection.address, timeout):
            response = await connection.inference.Infer(request, timeout=timeout)
        outcome = outcome_of_response(response)
        if isinstance(outcome, Result):
            return outcome
        raise outcome

    async def _write(
        self,
        request: inference_pb2.InferRequest,
        model: str,
        inputs: Inputs,
        options: InferOptions,
    ) -> None:
        description = await self._needed_description(model, inputs, options)
        write_request(request, model, inputs, description, **options)
