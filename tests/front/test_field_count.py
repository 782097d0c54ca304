# SPDX-License-Identifier: Apache-2.0
"""Messages of very many fields are refused before they are parsed; large tensors are not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2 as native
from thirdrail.v1 import models_pb2
from thirdrail_server.front.field_count import FIELDS_MAX, check_field_count
from thirdrail_server.inference import grpc_service_pb2 as kserve

MANY = FIELDS_MAX + 1
Tensor = native.InferRequest().inputs.add().__class__
KServeTensor = kserve.ModelInferRequest.InferInputTensor
Contents = kserve.InferTensorContents
EMPTY, ONES = [b""] * 50_000, [1] * 50_000


def check(message: Any) -> None:
    check_field_count(message.DESCRIPTOR, message.SerializeToString())


def names(count: int) -> dict[str, kserve.InferParameter]:
    return {str(number): kserve.InferParameter() for number in range(count)}


@pytest.mark.parametrize(
    "message",
    [
        native.InferRequest(inputs=[Tensor()] * 2 * MANY),
        native.InferRequest(outputs=[native.RequestedOutput(name="x")] * MANY),
        native.InferRequest(inputs=[Tensor(name="x", shape=[1] * 2 * MANY)]),
        native.InferRequest(inputs=[Tensor(name="x" * 4000, shape=[1])] * (MANY // 2)),
        native.InferStreamRequest(infer=native.InferRequest(inputs=[Tensor()] * 2 * MANY)),
        kserve.ModelInferRequest(inputs=[KServeTensor()] * 2 * MANY),
        kserve.ModelInferRequest(raw_input_contents=[b""] * 2 * MANY),
        kserve.ModelInferRequest(parameters=names(MANY)),
        kserve.ModelInferRequest(inputs=[KServeTensor(parameters=names(MANY))]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_swarms_are_refused(message: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"may have at most {FIELDS_MAX} fields"):
        check(message)


@pytest.mark.parametrize(
    "message",
    [
        native.InferRequest(inputs=[Tensor(name="x", shape=[1 << 20], raw=bytes(1 << 20))]),
        native.InferRequest(inputs=[Tensor(values=native.InferRequest().inputs.add().values)] * 64),
        kserve.ModelInferRequest(raw_input_contents=[bytes(1 << 20)] * 4),
        kserve.ModelInferRequest(
            inputs=[
                KServeTensor(contents=kserve.InferTensorContents(bytes_contents=[b""] * 50_000))
            ]
        ),
        kserve.ModelInferRequest(inputs=[KServeTensor(contents=Contents(bytes_contents=EMPTY))]),
        kserve.ModelInferRequest(inputs=[KServeTensor(contents=Contents(int_contents=ONES))]),
        models_pb2.WatchRequest(names=["x" * 100] * 100),
    ],
    ids=lambda message: type(message).__name__,
)
def test_tensors_may_be_large(message: Any) -> None:
    check(message)


def test_the_bound_is_exact() -> None:
    long = "x" * 2 * FIELDS_MAX  # a message that is not too small to be looked at
    outputs = [native.RequestedOutput()] * (FIELDS_MAX - 1)
    check(native.InferRequest(request_id=long, outputs=outputs))
    with pytest.raises(InvalidArgument):
        check(native.InferRequest(request_id=long, outputs=[*outputs, native.RequestedOutput()]))


def test_other_encodings_are_counted_too() -> None:
    """Shapes that are not packed, numbers with needless bytes, groups, unknown fields."""
    inputs = native.InferRequest(inputs=[Tensor()]).SerializeToString()
    for unit in (b"\xb2\x80\x00\x80\x00", b"\xfb\x3f\xfc\x3f", b"\xf8\x3f\x01", b"\xfd\x3f1234"):
        body = inputs + unit * 2 * MANY
        native.InferRequest.FromString(body)  # protobuf takes it
        with pytest.raises(InvalidArgument):
            check_field_count(native.InferRequest.DESCRIPTOR, body)
    tensor = b"\x18\x01" * 2 * MANY  # shape: 1, again and again
    body = b"\x32" + _varint(len(tensor)) + tensor
    with pytest.raises(InvalidArgument):
        check_field_count(native.InferRequest.DESCRIPTOR, body)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@given(st.binary(max_size=200))
def test_nonsense_is_left_to_protobuf(body: bytes) -> None:
    padding = native.InferRequest(request_id="x" * 3 * FIELDS_MAX).SerializeToString()
    check_field_count(native.InferRequest.DESCRIPTOR, padding + body)
