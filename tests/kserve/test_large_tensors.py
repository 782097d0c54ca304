# SPDX-License-Identifier: Apache-2.0
"""Large tensors pass protobuf by: they mean the same as ever, are copied once, and let go."""

import asyncio
import random
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.regions import no_regions
from thirdrail.errors import InvalidArgument
from thirdrail.lane.input_arena import bytes_of
from thirdrail_server.front.kserve.requests import native_request, parsed_request
from thirdrail_server.front.wire import LARGE_BYTES_MIN
from thirdrail_server.inference import grpc_service_pb2 as kserve

Serve = Any  # the fixture `serve` of conftest.py
Request = kserve.ModelInferRequest

sizes = st.sampled_from([0, 1, LARGE_BYTES_MIN - 1, LARGE_BYTES_MIN, 3 * LARGE_BYTES_MIN])


def request_of(raw_sizes: list[int], inputs: int | None = None, **fields: Any) -> Request:
    return Request(
        model_name="M",
        inputs=[
            Request.InferInputTensor(name=f"X{number}", datatype="UINT8", shape=[1, 1])
            for number in range(len(raw_sizes) if inputs is None else inputs)
        ],
        raw_input_contents=[random.Random(size).randbytes(size) for size in raw_sizes],
        **fields,
    )


@settings(deadline=None)
@given(st.lists(sizes, max_size=4), st.integers(0, 4))
def test_the_dispatcher_gets_what_protobuf_would_have_read(
    raw_sizes: list[int], inputs: int
) -> None:
    request = request_of(raw_sizes, inputs, id="r")
    body = request.SerializeToString()
    if inputs > len(raw_sizes):
        with pytest.raises(InvalidArgument, match="unable to find data"):
            native_request(*parsed_request(body), regions=no_regions(), time_left_us=None)
        return
    native, data = native_request(*parsed_request(body), regions=no_regions(), time_left_us=None)
    expected, plain = native_request(request, regions=no_regions(), time_left_us=None)
    assert native == expected
    assert [bytes_of(each or b"") for each in data] == plain


def test_large_tensors_are_views_of_the_message_that_came() -> None:
    body = request_of([LARGE_BYTES_MIN, 8]).SerializeToString()
    _, (large, small) = native_request(
        *parsed_request(body), regions=no_regions(), time_left_us=None
    )
    assert isinstance(large, memoryview)
    assert large.obj is body
    assert isinstance(small, bytes)


def test_contents_beside_a_large_raw_entry_are_refused() -> None:
    request = request_of([LARGE_BYTES_MIN])
    request.inputs[0].contents.uint_contents.append(1)
    with pytest.raises(InvalidArgument, match="contents field must not be specified when using"):
        native_request(
            *parsed_request(request.SerializeToString()), regions=no_regions(), time_left_us=None
        )


def test_a_large_message_that_makes_no_sense_is_refused_with_its_size() -> None:
    body = request_of([LARGE_BYTES_MIN]).SerializeToString() + b"\x0a\x01\xff"  # a name, not UTF-8
    with pytest.raises(InvalidArgument) as caught:
        parsed_request(body)
    assert caught.value.message == (
        f"a message of {len(body)} bytes is not a inference.ModelInferRequest"
    )


def test_unary_calls_return_large_tensors_and_release_their_memory(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            request = request_of([1 << 20, 5, 1 << 16])
            reply = await serving.stub.ModelInfer(request)
            assert reply.raw_output_contents == request.raw_input_contents
            assert [result.releases for result in serving.dispatcher.results] == [1]

    asyncio.run(run())


def test_a_reply_that_waits_for_its_turn_holds_no_memory_of_the_worker(serve: Serve) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["slow"] = asyncio.Event()
            request = request_of([1 << 20])
            call = serving.stub.ModelStreamInfer()
            await call.write(request_of([1], id="slow"))
            await call.write(request)
            while not serving.dispatcher.results or not serving.dispatcher.results[0].releases:
                await asyncio.sleep(0.005)
            assert not gate.is_set()
            gate.set()
            first, second = [await call.read() for _ in range(2)]
            assert first.infer_response.id == "slow"
            assert second.infer_response.raw_output_contents == request.raw_input_contents
            assert second.infer_response.parameters["triton_final_response"].bool_param

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"\xff", b"\xff" * LARGE_BYTES_MIN])
def test_what_is_no_request_ends_a_stream_after_what_came_before(serve: Serve, body: bytes) -> None:
    async def run() -> None:
        async with serve() as serving:
            gate = serving.dispatcher.gates["slow"] = asyncio.Event()
            path = "/inference.GRPCInferenceService/ModelStreamInfer"
            async with grpc.aio.insecure_channel(serving.address) as channel:
                bytewise: Any = channel.stream_stream(path)
                call = bytewise()
                await call.write(request_of([1], id="slow").SerializeToString())
                await call.write(body)
                while not serving.dispatcher.started:
                    await asyncio.sleep(0.005)
                gate.set()
                reply = kserve.ModelStreamInferResponse.FromString(await call.read())
                assert reply.infer_response.id == "slow"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == (
                f"a message of {len(body)} bytes is not a inference.ModelInferRequest"
            )

    asyncio.run(run())
