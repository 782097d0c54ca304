# SPDX-License-Identifier: Apache-2.0
"""The bare minimum to compare with: gRPC servers that parse a request and build its response.

They run no model, check nothing and use the stubs that anybody would generate. What they cost is
what gRPC for Python costs. `python -m bench.echo_servers aio|sync ADDRESS...` runs one until it is
told to end.
"""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, tensor_pb2
from thirdrail_server.config import ServerConfig
from thirdrail_server.front.listeners import channel_options

SYNC_THREADS = 80  # a stream holds one for as long as it is open

OPTIONS = channel_options(ServerConfig(repository=Path()))


def echo(request: pb.InferRequest) -> pb.InferResponse:
    """What an identity model answers."""
    (x,) = request.inputs
    y = tensor_pb2.Tensor(name="y", data_type=x.data_type, shape=x.shape, raw=x.raw)
    return pb.InferResponse(
        call=request.call,
        request_id=request.request_id,
        final=True,
        model_name=request.model_name,
        model_version=1,
        outputs=[y],
    )


class SyncEcho(inference_pb2_grpc.InferenceServicer):
    def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferResponse:
        return echo(request)

    def InferStream(
        self, requests: Iterator[pb.InferStreamRequest], context: Any
    ) -> Iterator[pb.InferStreamResponse]:
        for request in requests:
            yield pb.InferStreamResponse(infer=echo(request.infer))


class AioEcho(inference_pb2_grpc.InferenceServicer):
    async def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferResponse:
        return echo(request)

    async def InferStream(
        self, requests: AsyncIterator[pb.InferStreamRequest], context: Any
    ) -> AsyncIterator[pb.InferStreamResponse]:
        async for request in requests:
            yield pb.InferStreamResponse(infer=echo(request.infer))


def serve_sync(addresses: Sequence[str]) -> None:
    server = grpc.server(ThreadPoolExecutor(SYNC_THREADS), options=OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(SyncEcho(), server)
    for address in addresses:
        server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


async def serve_aio(addresses: Sequence[str]) -> None:
    server = grpc.aio.server(options=OPTIONS)
    inference_pb2_grpc.add_InferenceServicer_to_server(AioEcho(), server)
    for address in addresses:
        server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends us
    kind, *addresses = sys.argv[1:]
    if kind == "aio":
        asyncio.run(serve_aio(addresses))
    else:
        serve_sync(addresses)
