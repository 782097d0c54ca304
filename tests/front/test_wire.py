# SPDX-License-Identifier: Apache-2.0
"""Taking large bytes out of messages: what protobuf would read is what we get, for any bytes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.front.wire import LARGE_BYTES_MIN, bytes_field, detach, joined, only_field
from thirdrail_server.inference import grpc_service_pb2 as kserve

INPUTS, RAW = 6, 4  # of thirdrail.v1.InferRequest and Tensor
RAW_INPUT_CONTENTS = 7  # of inference.ModelInferRequest

sizes = st.sampled_from([0, 1, 100, LARGE_BYTES_MIN - 1, LARGE_BYTES_MIN, 3 * LARGE_BYTES_MIN])


def native(raw_sizes: list[int]) -> pb.InferRequest:
    request = pb.InferRequest(model_name="m", request_id="r", timeout_us=5, priority=1)
    for number, size in enumerate(raw_sizes):
        request.inputs.add(
            name=f"x{number}", shape=[size], raw=random.Random(number).randbytes(size)
        )
    request.parameters["p"].string_value = "last"
    return request


@settings(deadline=None)
@given(st.lists(sizes, max_size=4))
def test_native_tensors_come_out_and_everything_else_stays(raw_sizes: list[int]) -> None:
    request = native(raw_sizes)
    rest, taken = detach(request.SerializeToString(), INPUTS, RAW)
    small = pb.InferRequest.FromString(rest)
    assert [view is not None for view in taken] == [s >= LARGE_BYTES_MIN for s in raw_sizes]
    for tensor, view in zip(small.inputs, taken, strict=True):
        assert tensor.HasField("raw")
        if view is not None:
            assert tensor.raw == b""
            tensor.raw = bytes(view)
    assert small == request


@settings(deadline=None)
@given(st.lists(sizes, max_size=4))
def test_kserve_tensors_come_out_and_everything_else_stays(raw_sizes: list[int]) -> None:
    request = kserve.ModelInferRequest(model_name="m", id="i")
    request.raw_input_contents.extend(random.Random(s).randbytes(s) for s in raw_sizes)
    request.parameters["p"].int64_param = 3
    rest, taken = detach(request.SerializeToString(), RAW_INPUT_CONTENTS, None)
    small = kserve.ModelInferRequest.FromString(rest)
    for number, view in enumerate(taken):
        if view is not None:
            assert small.raw_input_contents[number] == b""
            small.raw_input_contents[number] = bytes(view)
    assert small == request


def test_of_several_choices_the_last_counts_as_ever() -> None:
    large = bytes(LARGE_BYTES_MIN)
    raw = tensor_pb2.Tensor(name="x", raw=large).SerializeToString()
    values = tensor_pb2.Tensor(values=tensor_pb2.Values(ints=[1])).SerializeToString()
    for entry, expected in ((raw + values, "values"), (values + raw, "raw")):
        body = joined(bytes_field(INPUTS, entry))
        assert pb.InferRequest.FromString(body).inputs[0].WhichOneof("data") == expected
        rest, _ = detach(body, INPUTS, RAW)
        assert pb.InferRequest.FromString(rest).inputs[0].WhichOneof("data") == expected


def test_bytes_that_come_twice_are_left_to_protobuf() -> None:
    raw = tensor_pb2.Tensor(raw=bytes(LARGE_BYTES_MIN)).SerializeToString()
    body = joined(bytes_field(INPUTS, raw, raw))
    assert detach(body, INPUTS, RAW) == (body, [None])


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 1 << 17), st.integers(0, 255))
def test_damaged_messages_never_raise_and_mean_the_same(
    junk: bytes, place: int, value: int
) -> None:
    body = bytearray(native([10, LARGE_BYTES_MIN, 5]).SerializeToString())
    body[place % len(body)] = value
    damaged = bytes(body[: len(body) - place % 7]) + junk
    rest, taken = detach(damaged, INPUTS, RAW)
    try:
        whole = pb.InferRequest.FromString(damaged)
    except Exception:
        with pytest.raises(Exception, match="pars"):
            pb.InferRequest.FromString(rest)
        return
    small = pb.InferRequest.FromString(rest)
    for tensor, view in zip(small.inputs, taken or [None] * len(small.inputs), strict=True):
        if view is not None and tensor.HasField("raw"):
            tensor.raw = bytes(view)
    assert small.SerializeToString(deterministic=True) == whole.SerializeToString(
        deterministic=True
    )


@given(st.binary(max_size=300), st.binary(max_size=3))
def test_the_only_field_of_a_message(payload: bytes, more: bytes) -> None:
    body = joined(bytes_field(1, payload))
    assert only_field(body, 1) == payload
    assert only_field(body, 2) is None
    if more:
        assert only_field(body + more, 1) is None
    assert only_field(body[:-1], 1) is None


def test_a_message_is_put_together_from_pieces() -> None:
    large = memoryview(bytes(range(256)) * 1024)
    head = pb.InferResponse(request_id="r").SerializeToString()
    entry = tensor_pb2.Tensor(name="y").SerializeToString()
    body = joined([head, *bytes_field(8, entry, *bytes_field(RAW, large))])
    response = pb.InferResponse.FromString(body)
    assert (response.request_id, response.outputs[0].name) == ("r", "y")
    assert response.outputs[0].raw == large
