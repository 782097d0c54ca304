# SPDX-License-Identifier: Apache-2.0
"""The blocking client. `aio.AsyncClient` has the same methods; what they share is in `requests`."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from thirdrail import health, models
from thirdrail.channels import Compression, TlsOptions, grpc_compression, open_channel
from thirdrail.discovery import find_address
from thirdrail.errors import FailedPrecondition, NotFound, TimedOut, Unavailable
from thirdrail.failures import error_of_ended_call, rpc_errors, with_note
from thirdrail.models import (
    DescriptionCache,
    ModelChange,
    ModelDescription,
    ModelStatus,
    OnProgress,
)
from thirdrail.requests import (
    InferOptions,
    Inputs,
    Result,
    needs_description,
    outcome_of_response,
    write_request,
)
from thirdrail.stream import IN_FLIGHT_MAX, Stream, settle
from thirdrail.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

READY_POLL_SECONDS = 0.05


class _Connection:
    """The channel of one process, and the services on it."""

    def __init__(self, address: str, channel: grpc.Channel) -> None:
        self.pid = os.getpid()
        self.address = address
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.models = models_pb2_grpc.ModelsStub(channel)
        self.metrics = metrics_pb2_grpc.MetricsStub(channel)
        self.check: Any = channel.unary_unary(
            health.CHECK_METHOD, health.encode_request, health.decode_response
        )


class Client:
    """Calls the models of a Thirdrail server.

    url: `host:port`, `unix:/path/of/the.sock` or a socket's path. None: the local server is found
        on the first call, by $THIRDRAIL_URL, its Unix socket, or 127.0.0.1:8001.
    tls: for a server that speaks TLS.
    compression: "gzip" compresses what is sent; it costs more than it saves on one host.

    Safe to use from several threads. A forked child gets a connection of its own on its first call;
    fork while no call is in flight, as gRPC asks for. Every method raises the exceptions of
    `thirdrail.errors`, and `thirdrail.Unreachable` when no server answers.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        tls: TlsOptions | None = None,
        compression: Compression | None = None,
    ) -> None:
        self._url = url
        self._tls = tls
        self._compression = grpc_compression(compression)
        self._is_closed = False
        self._connection: _Connection | None = None
        self._inherited: list[_Connection] = []
        self._locks: dict[int, threading.Lock] = {}
        self._descriptions = DescriptionCache()

    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """Runs a model once and waits for its outputs.

        inputs: a mapping from input names to tensors; a model with one input also takes its tensor
            alone. Arrays (numpy, anything with __array__, __dlpack__ or the buffer protocol) are
            sent as they are; lists, numbers, str and bytes are converted to the model's type.

        Options:
            outputs: names of the outputs wanted; all by default.
            version: of the model; the newest that is ready by default.
            request_id: given back in the result and written to the server's log.
            timeout: seconds after which TimedOut is raised; none by default.
            priority: 1 is the highest; the model's own by default.
            parameters: a mapping of bool, int, float or str.
            classes: the best N classes as b"value:index[:label]" instead of each output.
        """
        request = self._request(model, inputs, options)
        connection, timeout = self._connected(), options.get("timeout")
        with rpc_errors(connection.address, timeout):
            response = connection.inference.Infer(request, timeout=timeout)
        outcome = outcome_of_response(response)
        if isinstance(outcome, Result):
            return outcome
        raise outcome

    def submit(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Future[Result]:
        """`infer` that does not wait. Cancelling the future cancels the request in the server.

        Nothing bounds how many are in flight; `stream` does.
        """
        request = self._request(model, inputs, options)
        connection, timeout = self._connected(), options.get("timeout")
        call = connection.inference.Infer.future(request, timeout=timeout)
        return _future_of_call(call, connection.address, timeout)

    def stream(self, *, in_flight_max: int = IN_FLIGHT_MAX) -> Stream:
        """A stream for many requests to any models: `with client.stream() as stream:`."""
        connection = self._connected()
        return Stream(
            connection.inference,
            self._write,
            address=connection.address,
            in_flight_max=in_flight_max,
        )

    def models(self, *, ready_only: bool = False) -> list[ModelStatus]:
        """The state of every version of every model."""
        connection = self._connected()
        with rpc_errors(connection.address):
            response = connection.models.List(models_pb2.ListRequest(ready_only=ready_only))
        return [models.status_of_message(status) for status in response.models]

    def describe(self, model: str, *, version: int = 0) -> ModelDescription:
        """A model's inputs, outputs and configuration; of the newest ready version by default."""
        connection = self._connected()
        request = models_pb2.DescribeRequest(name=model, version=version)
        with rpc_errors(connection.address):
            response = connection.models.Describe(request)
        return models.description_of_message(response)

    def load(
        self, model: str, *, config_pbtxt: str = "", progress: OnProgress | None = None
    ) -> list[int]:
        """Loads or reloads a model and returns its ready versions. `progress` hears of each step.

        config_pbtxt: used in place of the repository's.
        """
        connection = self._connected()
        versions: list[int] = []
        request = models_pb2.LoadRequest(name=model, config_pbtxt=config_pbtxt)
        with rpc_errors(connection.address):
            for message in connection.models.Load(request):
                if progress is not None:
                    progress(models.progress_of_message(message))
                versions.extend(message.versions)
        return versions

    def unload(self, model: str) -> None:
        """Unloads a model; requests that are running finish first."""
        connection = self._connected()
        with rpc_errors(connection.address):
            connection.models.Unload(models_pb2.UnloadRequest(name=model))

    def watch(self, *names: str) -> Iterator[ModelChange]:
        """The state of every version now, then each change, until the iterator is closed."""
        connection = self._connected()
        call: Any = connection.models.Watch(models_pb2.WatchRequest(names=names))
        try:
            with rpc_errors(connection.address):
                for message in call:
                    yield models.change_of_message(message)
        finally:
            call.cancel()

    def health(self, model: str = "") -> bool:
        """Whether the server, or a model, can serve now. Raises NotFound for an unknown model."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return bool(connection.check(model) == health.SERVING)

    def metrics(self) -> str:
        """The server's metrics as Prometheus text."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return connection.metrics.Scrape(metrics_pb2.ScrapeRequest()).text

    def snapshot(self) -> metrics_pb2.SnapshotResponse:
        """The same figures as numbers: sums since the server started, and its workers."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return connection.metrics.Snapshot(metrics_pb2.SnapshotRequest())

    def wait_ready(self, timeout: float = 60.0, *, model: str = "") -> None:
        """Waits until the server, or a model, can serve; also for one that is yet to be started.

        timeout: seconds. Raises TimedOut with the last reason.
        """
        deadline = time.monotonic() + timeout
        while (fault := self._ready_fault(model)) is not None:
            if time.monotonic() >= deadline:
                raise with_note(TimedOut(f"not ready within {timeout:g} s: {fault}"))
            time.sleep(READY_POLL_SECONDS)

    def close(self) -> None:
        """Closes the connection; calls in flight end with Cancelled. May be called twice."""
        self._is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None and connection.pid == os.getpid():
            connection.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._connection is not None:
            return f"<Client {self._connection.address} open>"
        state = "closed" if self._is_closed else "not connected"
        return f"<Client {self._url or 'local'} {state}>"

    def _connected(self) -> _Connection:
        connection = self._connection
        if connection is not None and connection.pid == os.getpid():
            return connection
        # One lock per process: the parent's may have been held by a thread when it forked.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            return self._connect()

    def _connect(self) -> _Connection:
        if self._is_closed:
            raise FailedPrecondition("this client is closed")
        connection = self._connection
        if connection is not None:
            if connection.pid == os.getpid():
                return connection  # another thread was faster
            # Kept, never closed: closing could end the parent's connection.
            self._inherited.append(connection)
        address = find_address(self._url, sockets=self._tls is None)
        channel = open_channel(address, self._tls, self._compression)
        self._connection = _Connection(address, channel)
        return self._connection

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
        description = None
        if needs_description(inputs, options):
            description = self._description(model, options.get("version", 0))
        write_request(request, model, inputs, description, **options)

    def _description(self, model: str, version: int) -> ModelDescription:
        now_ns = time.monotonic_ns()
        description = self._descriptions.get(model, version, now_ns)
        if description is None:
            description = self.describe(model, version=version)
            self._descriptions.put(model, version, description, now_ns)
        return description

    def _ready_fault(self, model: str) -> str | None:
        try:
            return None if self.health(model) else "it says that it is not serving"
        except (Unavailable, NotFound) as error:
            return str(error)


def _future_of_call(call: Any, address: str, timeout: float | None) -> Future[Result]:
    future: Future[Result] = Future()

    def finish(ended: Any) -> None:
        if ended.code() is grpc.StatusCode.OK:
            settle(future, outcome_of_response(ended.result()))
        else:
            settle(future, error_of_ended_call(ended, address=address, timeout=timeout))

    call.add_done_callback(finish)
    future.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
    return future
