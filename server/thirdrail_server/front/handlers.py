# SPDX-License-Identifier: Apache-2.0
"""A service's methods as a gRPC server takes them, built from the service's descriptor.

Left alone, gRPC's asyncio server answers bytes that are no message with UNKNOWN and the text of a
Python exception, and logs a traceback for each: a stranger could fill the log. Here requests are
parsed inside our code, and the caller is told.

Handlers are generic: methods that are registered by name, as generated code does besides, grpc.aio
goes through whenever a call comes, which takes 20 us of CPU for our 35.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from thirdrail.errors import ThirdrailError
from thirdrail_server.front.statuses import Context, abort_with
from thirdrail_server.front.wire import parsed

Abort = Callable[[Context, ThirdrailError], Awaitable[None]]  # ends the call, never returns
Behavior = Callable[..., Any]  # of a method of one of the four kinds


def service_handler(
    service: ServiceDescriptor,
    servicer: object,
    abort: Abort = abort_with,
    *,
    of_bytes: Collection[str] = (),
) -> grpc.GenericRpcHandler:
    """For a server's add_generic_rpc_handlers.

    servicer: has each of the service's methods, which takes a message, or an iterator of them, and
        the context. It returns a message, or is a generator of messages where it streams them.
    abort: ends a call with the status of an error.
    of_bytes: the names of methods that work on serialized messages instead, and that write to the
        context where they stream.
    """
    handlers = {}
    for method in service.methods:
        behavior = getattr(servicer, method.name)
        if method.name in of_bytes:
            handlers[method.name] = _handler(method, behavior, None)
        else:
            parsing = _parsing(method, behavior, abort)
            handlers[method.name] = _handler(method, parsing, _serialized)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(
    method: MethodDescriptor, behavior: Behavior, serializer: Callable[[Any], bytes] | None
) -> "grpc.RpcMethodHandler[Any, Any]":
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    kind = kinds[method.client_streaming, method.server_streaming]
    return kind(_letting_go(behavior), response_serializer=serializer)


def _letting_go(behavior: Behavior) -> Behavior:
    """The same, of whose refusals nothing is kept. gRPC's call has what its abort raised, and that
    all frames it went through, which have the call: requests of many MiB would stay until the
    garbage collector comes by.
    """

    async def call(came: Any, context: Context) -> Any:
        try:
            return await behavior(came, context)
        except grpc.aio.AbortError as ended:
            del came
            ended.__context__ = None
            raise ended.with_traceback(None) from None

    return call


def _parsing(method: MethodDescriptor, behavior: Behavior, abort: Abort) -> Behavior:
    """The method on bytes that come, for one on messages."""
    kind = GetMessageClass(method.input_type)
    read: Callable[[Any], Any] = functools.partial(
        _each_parsed if method.client_streaming else parsed, kind
    )
    answer = _streamed if method.server_streaming else _returned

    async def call(came: Any, context: Context) -> Message | None:
        try:
            return await answer(behavior, read(came), context)
        except ThirdrailError as error:
            await abort(context, error)
            raise

    return call


async def _each_parsed(kind: type[Message], bodies: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for body in bodies:
        yield parsed(kind, body)


async def _returned(behavior: Behavior, request: Any, context: Context) -> Message:
    response: Message = await behavior(request, context)
    return response


async def _streamed(behavior: Behavior, request: Any, context: Context) -> None:
    # A generator that is cancelled while gRPC writes what it yielded is not cleaned up until it is
    # collected; this one is, at once.
    async with aclosing(behavior(request, context)) as responses:
        async for response in responses:
            await context.write(response)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
