# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio, the twin of `client.Client`: the same methods, to be awaited."""

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import grpc

from thirdrail import health, models
from thirdrail.aio_stream import AsyncStream
from thirdrail.channels import Compression, TlsOptions, grpc_compression, open_aio_channel
from thirdrail.client import READY_POLL_SECONDS
from thirdrail.discovery import find_address
from thirdrail.errors import FailedPrecondition, NotFound, TimedOut, Unavailable
from thirdrail.failures import rpc_errors, with_note
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
from thirdrail.stream import IN_FLIGHT_MAX
from thirdrail.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

if TYPE_CHECKING:  # the asynchronous stubs exist for the type checker only
    from thirdrail.v1.inference_pb2_grpc import InferenceAsyncStub
    from thirdrail.v1.metrics_pb2_grpc import MetricsAsyncStub
    from thirdrail.v1.models_pb2_grpc import ModelsAsyncStub


class _Connection:
    """The channel of one event loop, and the services on it."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.get_running_loop()
        self.address = address
        self.channel = channel
        self.inference = cast("InferenceAsyncStub", inference_pb2_grpc.InferenceStub(channel))
        self.models = cast("ModelsAsyncStub", models_pb2_grpc.ModelsStub(channel))
        self.metrics = cast("MetricsAsyncStub", metrics_pb2_grpc.MetricsStub(channel))
        self.check: Any = channel.unary_unary(
            health.CHECK_METHOD, health.encode_request, health.decode_response
        )


# What is open, so that a forked child can tell: grpc.aio does not start again in the child of a
# process that uses it, and calls there would hang.
_OPEN: weakref.WeakSet[_Connection] = weakref.WeakSet()


class AsyncClient:
    """Calls the models of a Thirdrail server from asyncio.

    Takes the arguments of `Client`, and raises what it raises. Use it in one event loop at a time,
    and in a forked child only when every AsyncClient of the parent was closed before the fork.
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
        self._descriptions = DescriptionCache()

    async def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
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
        request = await self._request(model, inputs, options)
        connection, timeout = self._connected(), options.get("timeout")
        with rpc_errors(connection.address, timeout):
            response = await connection.inference.Infer(request, timeout=timeout)
        outcome = outcome_of_response(response)
        if isinstance(outcome, Result):
            return outcome
        raise outcome

    def submit(
        self, model: str, inputs: Inputs, **options: Unpack[InferOptions]
    ) -> asyncio.Task[Result]:
        """`infer` as a task. Cancelling the task cancels the request in the server.

        Nothing bounds how many are in flight; `stream` does.
        """
        return asyncio.create_task(self.infer(model, inputs, **options))

    def stream(self, *, in_flight_max: int = IN_FLIGHT_MAX) -> AsyncStream:
        """A stream for many requests to any models: `async with client.stream() as stream:`."""
        connection = self._connected()
        return AsyncStream(
            connection.inference,
            self._write,
            address=connection.address,
            in_flight_max=in_flight_max,
        )

    async def models(self, *, ready_only: bool = False) -> list[ModelStatus]:
        """The state of every version of every model."""
        connection = self._connected()
        with rpc_errors(connection.address):
            response = await connection.models.List(models_pb2.ListRequest(ready_only=ready_only))
        return [models.status_of_message(status) for status in response.models]

    async def describe(self, model: str, *, version: int = 0) -> ModelDescription:
        """A model's inputs, outputs and configuration; of the newest ready version by default."""
        connection = self._connected()
        request = models_pb2.DescribeRequest(name=model, version=version)
        with rpc_errors(connection.address):
            response = await connection.models.Describe(request)
        return models.description_of_message(response)

    async def load(
        self, model: str, *, config_pbtxt: str = "", progress: OnProgress | None = None
    ) -> list[int]:
        """Loads or reloads a model and returns its ready versions. `progress` hears of each step.

        config_pbtxt: used in place of the repository's.
        """
        connection = self._connected()
        versions: list[int] = []
        request = models_pb2.LoadRequest(name=model, config_pbtxt=config_pbtxt)
        with rpc_errors(connection.address):
            async for message in connection.models.Load(request):
                if progress is not None:
                    progress(models.progress_of_message(message))
                versions.extend(message.versions)
        return versions

    async def unload(self, model: str) -> None:
        """Unloads a model; requests that are running finish first."""
        connection = self._connected()
        with rpc_errors(connection.address):
            await connection.models.Unload(models_pb2.UnloadRequest(name=model))

    async def watch(self, *names: str) -> AsyncIterator[ModelChange]:
        """The state of every version now, then each change, until the iterator is closed."""
        connection = self._connected()
        call: Any = connection.models.Watch(models_pb2.WatchRequest(names=names))
        try:
            with rpc_errors(connection.address):
                async for message in call:
                    yield models.change_of_message(message)
        finally:
            call.cancel()

    async def health(self, model: str = "") -> bool:
        """Whether the server, or a model, can serve now. Raises NotFound for an unknown model."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return bool(await connection.check(model) == health.SERVING)

    async def metrics(self) -> str:
        """The server's metrics as Prometheus text."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return (await connection.metrics.Scrape(metrics_pb2.ScrapeRequest())).text

    async def snapshot(self) -> metrics_pb2.SnapshotResponse:
        """The same figures as numbers: sums since the server started, and its workers."""
        connection = self._connected()
        with rpc_errors(connection.address):
            return await connection.metrics.Snapshot(metrics_pb2.SnapshotRequest())

    async def wait_ready(self, timeout: float = 60.0, *, model: str = "") -> None:
        """Waits until the server, or a model, can serve; also for one that is yet to be started.

        timeout: seconds. Raises TimedOut with the last reason.
        """
        deadline = time.monotonic() + timeout
        while (fault := await self._ready_fault(model)) is not None:
            if time.monotonic() >= deadline:
                raise with_note(TimedOut(f"not ready within {timeout:g} s: {fault}"))
            await asyncio.sleep(READY_POLL_SECONDS)

    async def close(self) -> None:
        """Closes the connection; calls in flight end with Cancelled. May be called twice."""
        self._is_closed = True
        connection, self._connection = self._connection, None
        if connection is not None and connection.pid == os.getpid():
            _OPEN.discard(connection)
            await connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        if self._connection is not None:
            return f"<AsyncClient {self._connection.address} open>"
        state = "closed" if self._is_closed else "not connected"
        return f"<AsyncClient {self._url or 'local'} {state}>"

    def _connected(self) -> _Connection:
        connection = self._connection
        if connection is not None and connection.pid == os.getpid():
            if connection.loop is asyncio.get_running_loop():
                return connection
            _OPEN.discard(connection)  # its loop has ended, and its channel with it
        return self._connect()

    def _connect(self) -> _Connection:
        if self._is_closed:
            raise FailedPrecondition("this client is closed")
        if any(connection.pid != os.getpid() for connection in _OPEN):
            raise FailedPrecondition(
                "an AsyncClient was open when this process was forked, and grpc.aio cannot start "
                "again here: close it before the fork, spawn the process, or use Client"
            )
        address = find_address(self._url, sockets=self._tls is None)
        channel = open_aio_channel(address, self._tls, self._compression)
        self._connection = _Connection(address, channel)
        _OPEN.add(self._connection)
        return self._connection

    async def _request(
        self, model: str, inputs: Inputs, options: InferOptions
    ) -> inference_pb2.InferRequest:
        request = inference_pb2.InferRequest()
        await self._write(request, model, inputs, options)
        return request

    async def _write(
        self,
        request: inference_pb2.InferRequest,
        model: str,
        inputs: Inputs,
        options: InferOptions,
    ) -> None:
        description = None
        if needs_description(inputs, options):
            description = await self._description(model, options.get("version", 0))
        write_request(request, model, inputs, description, **options)

    async def _description(self, model: str, version: int) -> ModelDescription:
        now_ns = time.monotonic_ns()
        description = self._descriptions.get(model, version, now_ns)
        if description is None:
            description = await self.describe(model, version=version)
            self._descriptions.put(model, version, description, now_ns)
        return description

    async def _ready_fault(self, model: str) -> str | None:
        try:
            return None if await self.health(model) else "it says that it is not serving"
        except (Unavailable, NotFound) as error:
            return str(error)
