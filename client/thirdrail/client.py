# SPDX-License-Identifier: Apache-2.0
"""The blocking client. `aio.AsyncClient` has the same methods; what they share is in `requests`."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from thirdrail.channels import Compression, TlsOptions, grpc_compression, open_channel
from thirdrail.connection import Connection
from thirdrail.discovery import find_address, url_of
from thirdrail.dtypes import extent
from thirdrail.errors import FailedPrecondition, InvalidArgument, NotFound
from thirdrail.failures import IS_CLOSED, rpc_errors
from thirdrail.lane.busy_poll import LONGEST_US, BusyWindow
from thirdrail.lane.encoding import Encoder
from thirdrail.lane_choice import LaneChoice
from thirdrail.models import DescriptionCache
from thirdrail.requests import (
    InferOptions,
    Inputs,
    Result,
    named_arrays,
    outcome_of_response,
    write_request,
)
from thirdrail.stream import IN_FLIGHT_MAX, Stream, require_room
from thirdrail.tensors import Array
from thirdrail.transport import (
    LIFETIME_S,
    NOTHING_YET,
    LaneRule,
    Transport,
    TransportChoice,
)
from thirdrail.unary import future_of_call
from thirdrail.v1 import inference_pb2
from thirdrail.worker_streams import WorkerStreams

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.blocking import BlockingLane
    from thirdrail.lane.blocking_exports import Export
    from thirdrail.lane.exports import SharedTensor


class Client(LaneChoice):
    """Calls the models of a Thirdrail server.

    url: `host:port`, `unix:/path/of/the.sock` or a socket's path. None: the local server is found
        on the first call, by $THIRDRAIL_URL, its Unix socket, or 127.0.0.1:8001.
    tls: for a server that speaks TLS.
    compression: "gzip" compresses what is sent over gRPC; on one host it costs more than it saves.
    transport: "auto" attaches to the lane of a server on this host, where tensors go through shared
        memory, and uses gRPC elsewhere; `client.transport` says which and why. "lane" raises where
        it cannot attach, "grpc" never does.
    busy_poll_us: how long a thread that waits for the lane looks at most before it sleeps; 0 never
        looks. It adapts, and looks only where answers have come within this time.
    debug: find misuse of shared memory: released results are overwritten, and inputs that are
        written while a request reads them fail it with FailedPrecondition.

    Safe to use from several threads. A forked child gets a connection of its own on its first call;
    fork while no call is in flight, as gRPC asks for. Every method raises the exceptions of
    `thirdrail.errors`, and `thirdrail.Unreachable` when no server answers.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        tls: TlsOptions | None = None,
        compression: Compression | None = None,
        transport: TransportChoice = "auto",
        busy_poll_us: int = LONGEST_US,
        debug: bool = False,
    ) -> None:
        super().__init__()
        self._url = url_of(url)
        self._tls = tls
        self._compression = grpc_compression(compression)
        self._rule = LaneRule(transport)
        BusyWindow(busy_poll_us)  # raises for what makes no sense, here and not at the first call
        self._busy_poll_us = busy_poll_us
        self._is_debug = debug
        self._is_closed = False
        self._connection: Connection | None = None
        self._inherited: list[Connection] = []
        self._locks: dict[int, threading.Lock] = {}
        self._encoder = Encoder()

    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
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
            return self._infer(model, inputs, options)
        except InvalidArgument:
            if not self._was_outdated(model, inputs, options, began_ns):
                raise
        return self._infer(model, inputs, options)

    def _infer(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        timeout, borrow = options.get("timeout"), options.get("borrow", False)

        def over_lane(lane: "BlockingLane") -> Result:
            head, arrays = self._encode(model, inputs, options)
            return lane.infer(head, arrays, borrow=borrow, timeout=timeout)

        try:
            result = self._over_lane(over_lane, model)
        except NotFound as error:
            if not self._connected().lanes.forget(model):
                raise self._why_missing(model, options, error) from None
            try:
                result = self._over_lane(over_lane, model)  # where it is now
            except NotFound as again:
                raise self._why_missing(model, options, again) from None
        return self._infer_over_grpc(model, inputs, options) if result is None else result

    def submit(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Future[Result]:
        """`infer` that does not wait. Cancelling the future cancels the request in the server.

        Nothing but the limits of the lane, or over gRPC of the server, bounds how many are in
        flight, with ResourceExhausted; `stream` does.
        """
        timeout, borrow = options.get("timeout"), options.get("borrow", False)

        def over_lane(lane: "BlockingLane") -> Future[Result]:
            head, arrays = self._encode(model, inputs, options)
            why = partial(self._why_missing, model, options)
            return lane.submit(head, arrays, borrow=borrow, timeout=timeout, why_missing=why)

        future = self._over_lane(over_lane, model)
        if future is not None:
            return future
        request = self._request(model, inputs, options)
        connection = self._connected()
        with rpc_errors(connection.address, timeout):
            call = connection.inference.Infer.future(request, timeout=timeout)
        return future_of_call(call, connection.address, timeout, connection.teller)

    def stream(self, *, in_flight_max: int = IN_FLIGHT_MAX) -> Stream:
        """A stream for many requests to any models: `with client.stream() as stream:`.

        in_flight_max: so many wait for their answers at most, then `submit` waits; 1 or more.
        """
        require_room(in_flight_max)
        connection = self._connected()

        def stream_on(lane: "BlockingLane | None") -> Stream:
            if lane is not None:
                from thirdrail.lane.lane_stream import LaneStream  # needs Linux

                encode, why = self._encode, self._why_missing
                return LaneStream(lane, encode, why, in_flight_max=in_flight_max)
            return Stream(
                connection.inference,
                self._write,
                address=connection.address,
                in_flight_max=in_flight_max,
            )

        lane = connection.access.lane()
        if not connection.lanes.are_several:
            return stream_on(lane)
        return WorkerStreams(self._lane_for, stream_on)

    def empty(
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
        array = self._over_lane(lambda lane: lane.empty(shape, dtype, alone=shared))
        return np.empty(*extent(shape, dtype)[:2]) if array is None else array

    def export(
        self, tensor: Any, *, uid: int | None = None, lifetime: float = LIFETIME_S
    ) -> "Export":
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
        from thirdrail.lane.blocking_exports import export

        return self._on_lane(lambda lane: export(lane, tensor, uid, lifetime))

    def receive(self, token: str) -> "SharedTensor":
        """The tensor that another process has exported, mapped and not copied.

        Raises FailedPrecondition without the lane and for a token that is used up, expired, revoked
        or unknown, PermissionDenied where it is for another user.
        """
        from thirdrail.lane.blocking_exports import receive

        return self._on_lane(lambda lane: receive(lane, token))

    @property
    def transport(self) -> Transport:
        """What calls travel on, and why not on the lane."""
        connection = self._connection
        return NOTHING_YET if connection is None else connection.lanes.transport

    def close(self) -> None:
        """Closes the connection; calls in flight end with Cancelled. May be called twice."""
        self._is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Pickled or copied, it is a client of its own with the same settings."""
        anew: dict[str, Any] = {
            "_connection": None,
            "_inherited": [],
            "_locks": {},
            "_encoder": Encoder(),
        }
        anew |= {"_rule": LaneRule(self._rule.choice), "_descriptions": DescriptionCache()}
        return self.__dict__ | anew

    def __repr__(self) -> str:
        connection = self._connection
        if connection is not None:
            return f"<Client {connection.address} open>"
        state = "closed" if self._is_closed else "not connected"
        return f"<Client {self._url or 'local'} {state}>"

    def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None and connection.pid == os.getpid():
            return connection
        # One lock per process: the parent's may have been held by a thread when it forked.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            connection = self._connect()
        if self._is_closed:  # meanwhile, by another thread, which may not have seen it
            connection.close()
            raise FailedPrecondition(IS_CLOSED)
        return connection

    def _connect(self) -> Connection:
        if self._is_closed:
            raise FailedPrecondition(IS_CLOSED)
        connection = self._connection
        if connection is not None:
            if connection.pid == os.getpid():
                return connection  # another thread was faster
            # Kept, never closed: closing could end the parent's connection.
            self._inherited.append(connection)
        address = find_address(self._url, sockets=self._tls is None)
        channel = open_channel(address, self._tls, self._compression)
        self._connection = connection = Connection(
            address,
            channel,
            self._rule,
            busy_poll_us=self._busy_poll_us,
            is_debug=self._is_debug,
        )
        return connection

    def _request(
        self, model: str, inputs: Inputs, options: InferOptions
    ) -> inference_pb2.InferRequest:
        request = inference_pb2.InferRequest()
        self._write(request, model, inputs, options)
        return request

    def _write(
        self,
        request: inference_pb2.InferRequest,
        model: str,
        inputs: Inputs,
        options: InferOptions,
    ) -> None:
        description = self._needed_description(model, inputs, options)
        write_request(request, model, inputs, description, **options)

    def _encode(
        self, model: str, inputs: Inputs, options: InferOptions
    ) -> tuple[bytes, Mapping[str, Array]]:
        """A request without its inputs, and these: what the lane takes."""
        description = self._needed_description(model, inputs, options)
        head = self._encoder.options(model, description, options)
        return head, named_arrays(inputs, description)

    def _infer_over_grpc(self, model: str, inputs: Inputs, options: InferOptions) -> Result:
        request = self._request(model, inputs, options)
        connection, timeout = self._connected(), options.get("timeout")
        with rpc_errors(connection.address, timeout):
            response = connection.inference.Infer(request, timeout=timeout)
        outcome = outcome_of_response(response)
        if isinstance(outcome, Result):
            return outcome
        raise outcome
