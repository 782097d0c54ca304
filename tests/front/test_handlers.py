# SPDX-License-Identifier: Apache-2.0
"""Handlers built from descriptors: every method of the real front, and each kind of method."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from thirdrail.errors import NotFound
from thirdrail.v1 import inference_pb2, metrics_pb2, models_pb2
from thirdrail_server.config import ServerConfig
from thirdrail_server.front.handlers import service_handler
from thirdrail_server.front.process import Front
from thirdrail_server.front.statuses import abort_with
from thirdrail_server.inference import grpc_service_pb2

MODULES: list[Any] = [
    inference_pb2,
    models_pb2,
    metrics_pb2,
    grpc_service_pb2,
    health_pb2,
    reflection_pb2,
    channelz_pb2,
]
METHODS: list[MethodDescriptor] = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
MODELS: ServiceDescriptor = models_pb2.DESCRIPTOR.services_by_name["Models"]
REFLECTION: Any = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
Status = grpc.StatusCode
Ended = tuple[Status, str]


def call_of(channel: grpc.aio.Channel, method: MethodDescriptor, *bodies: bytes) -> Any:
    """A call of the method with these bytes."""
    kind = "stream" if method.client_streaming else "unary"
    answers = "stream" if method.server_streaming else "unary"
    make: Any = getattr(channel, f"{kind}_{answers}")(path_of(method))
    return make(iter(bodies) if method.client_streaming else bodies[0], timeout=20)


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


async def end_of(call: Any) -> Ended:
    return await call.code(), await call.details()


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff" * 40_000])
async def test_bytes_that_are_no_message_are_refused_by_every_method(
    tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "s" / "grpc.sock"
    front = Front(ServerConfig(tmp_path / "models", address=None, socket=path, channelz=True))
    try:
        await front.start()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            ends = {path_of(each): await end_of(call_of(channel, each, body)) for each in METHODS}
    finally:
        await front.stop()
    assert ends == {
        path_of(each): (
            Status.INVALID_ARGUMENT,
            f"a message of {len(body)} bytes is not a {each.input_type.full_name}",
        )
        for each in METHODS
    }
    assert "Traceback" not in caplog.text


class Models:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.is_closed = asyncio.Event()

    async def List(self, request: models_pb2.ListRequest, context: Any) -> models_pb2.ListResponse:
        name = "ready" if request.ready_only else "any"
        return models_pb2.ListResponse(models=[models_pb2.ModelStatus(name=name)])

    async def Describe(self, request: models_pb2.DescribeRequest, context: Any) -> None:
        raise NotFound(f"there is no '{request.name}'")

    async def Load(self, body: bytes, context: Any) -> None:
        await context.write(body)

    async def Unload(self, body: bytes, context: Any) -> bytes:
        return body

    def Watch(
        self, request: models_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[models_pb2.WatchResponse]:
        self.watching = self._watch(request)  # kept: it must not depend on its collection
        return self.watching

    async def _watch(
        self, request: models_pb2.WatchRequest
    ) -> AsyncIterator[models_pb2.WatchResponse]:
        try:
            for name in request.names:
                yield models_pb2.WatchResponse(status=models_pb2.ModelStatus(name=name))
        finally:
            self.is_closed.set()


@asynccontextmanager
async def served(tmp_path: Path, handler: grpc.GenericRpcHandler) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            yield channel
    finally:
        await server.stop(0)


def models_handler(servicer: Models) -> grpc.GenericRpcHandler:
    return service_handler(MODELS, servicer, of_bytes=("Load", "Unload"))


async def test_messages_and_bytes_pass_as_each_method_takes_them(tmp_path: Path) -> None:
    def call(channel: grpc.aio.Channel, name: str, body: bytes) -> Any:
        return call_of(channel, MODELS.methods_by_name[name], body)

    async with served(tmp_path, models_handler(Models())) as channel:
        ask = models_pb2.ListRequest(ready_only=True).SerializeToString()
        listed = models_pb2.ListResponse.FromString(await call(channel, "List", ask))
        assert [each.name for each in listed.models] == ["ready"]
        watch = models_pb2.WatchRequest(names=["a", "b"]).SerializeToString()
        told = [body async for body in call(channel, "Watch", watch)]
        names = [models_pb2.WatchResponse.FromString(body).status.name for body in told]
        assert names == ["a", "b"]
        assert await call(channel, "Unload", b"\xff") == b"\xff"
        assert [body async for body in call(channel, "Load", b"\xff")] == [b"\xff"]


async def test_an_error_of_ours_that_a_method_lets_out_has_its_status(tmp_path: Path) -> None:
    async with served(tmp_path, models_handler(Models())) as channel:
        ask = models_pb2.DescribeRequest(name="x").SerializeToString()
        call = call_of(channel, MODELS.methods_by_name["Describe"], ask)
        assert await end_of(call) == (Status.NOT_FOUND, "there is no 'x'")


class Request:
    """As large as it may be."""


class Refusing(Models):
    """Keeps nothing of what it was asked, but for what its frames have."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[weakref.ref[Request]] = []

    async def Describe(self, request: models_pb2.DescribeRequest, context: Any) -> None:
        large = Request()
        self.requests.append(weakref.ref(large))
        raise NotFound("there is none")

    async def Unload(self, body: bytes, context: Any) -> bytes:
        large = Request()
        self.requests.append(weakref.ref(large))
        await abort_with(context, NotFound("there is none"))


async def test_a_refused_request_is_not_kept(tmp_path: Path) -> None:
    """gRPC keeps what ended a call, and the call that, until the garbage collector comes by."""
    servicer = Refusing()
    async with served(tmp_path, models_handler(servicer)) as channel:
        gc.collect()
        gc.disable()
        try:
            for name in ("Describe", "Unload"):
                call = call_of(channel, MODELS.methods_by_name[name], b"")
                assert await end_of(call) == (Status.NOT_FOUND, "there is none")
            async with asyncio.timeout(20):
                while any(request() is not None for request in servicer.requests):
                    await asyncio.sleep(0.002)
        finally:
            gc.enable()


async def test_a_generator_ends_with_its_call_even_while_its_response_is_written(
    tmp_path: Path,
) -> None:
    servicer = Models()
    async with served(tmp_path, models_handler(servicer)) as channel:
        many = models_pb2.WatchRequest(names=["x" * (1 << 20)] * 3).SerializeToString()
        call = call_of(channel, MODELS.methods_by_name["Watch"], many)
        await call.read()  # and no more: the server cannot write the rest
        call.cancel()
        async with asyncio.timeout(20):
            await servicer.is_closed.wait()


async def test_a_stream_is_refused_at_the_message_that_makes_no_sense(tmp_path: Path) -> None:
    servicer = reflection.aio.ReflectionServicer(["a.Service"])
    async with served(tmp_path, service_handler(REFLECTION, servicer)) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
        call = call_of(channel, REFLECTION.methods[0], ask, b"\xff")
        answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        assert [each.name for each in answer.list_services_response.service] == ["a.Service"]
        assert await end_of(call) == (
            Status.INVALID_ARGUMENT,
            "a message of 1 bytes is not a grpc.reflection.v1alpha.ServerReflectionRequest",
        )
