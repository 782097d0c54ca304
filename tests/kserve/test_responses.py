# SPDX-License-Identifier: Apache-2.0
"""What the dispatcher gives back as a reply, as a stream's message, and as an error's text."""

import numpy as np
import pytest

from thirdrail import tensors
from thirdrail.dtypes import Buffer
from thirdrail.errors import (
    InvalidArgument,
    NotFound,
    QueueFull,
    ThirdrailError,
)
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.front.kserve import responses, status
from thirdrail_server.inference import grpc_service_pb2 as kserve


def tensor(name: str, data_type: str = "FP32", shape: tuple[int, ...] = (1,)) -> tensor_pb2.Tensor:
    value = tensor_pb2.DataType.Value(f"DATA_TYPE_{data_type}")
    return tensor_pb2.Tensor(name=name, data_type=value, shape=shape)


def test_outputs_are_raw_and_in_order() -> None:
    response = inference_pb2.InferResponse(
        model_name="M",
        model_version=4,
        outputs=[tensor("B"), tensor("none", "INT8", (0, 3)), tensor("A", "BYTES", (1, 1))],
        parameters={
            "b": inference_pb2.Parameter(bool_value=True),
            "i": inference_pb2.Parameter(int_value=-1),
            "s": inference_pb2.Parameter(string_value="x"),
            "d": inference_pb2.Parameter(double_value=0.5),
            "u": inference_pb2.Parameter(uint_value=1),
        },
    )
    data: list[Buffer | None] = [
        memoryview(b"bbbb"),
        b"",
        memoryview(bytearray(b"\x01\0\0\0a")),
    ]

    message = kserve.ModelInferResponse.FromString(
        responses.unary_reply(response, data, request_id="r-1")
    )

    output = kserve.ModelInferResponse.InferOutputTensor
    assert message == kserve.ModelInferResponse(
        model_name="M",
        model_version="4",
        id="r-1",
        outputs=[
            output(name="B", datatype="FP32", shape=[1]),
            output(name="none", datatype="INT8", shape=[0, 3]),
            output(name="A", datatype="BYTES", shape=[1, 1]),
        ],
        raw_output_contents=[b"bbbb", b"", b"\x01\0\0\0a"],
        parameters={
            "b": kserve.InferParameter(bool_param=True),
            "i": kserve.InferParameter(int64_param=-1),
            "s": kserve.InferParameter(string_param="x"),
            "d": kserve.InferParameter(double_param=0.5),
            "u": kserve.InferParameter(uint64_param=1),
        },
    )


@pytest.mark.parametrize("form", ["raw", "values"])
def test_elements_inside_the_response_become_raw_too(form: str) -> None:
    array = np.array([[1.5, -2.0]], dtype=np.float32)
    output = tensors.tensor_of_array("Y", array)
    if form == "values":
        output.values.CopyFrom(tensors.values_of_array(array))
    response = inference_pb2.InferResponse(outputs=[output])

    message = kserve.ModelInferResponse.FromString(
        responses.unary_reply(response, [None], request_id="")
    )

    assert list(message.raw_output_contents) == [array.tobytes()]
    assert not message.outputs[0].HasField("contents")


@pytest.mark.parametrize("is_final", [True, False])
def test_a_stream_reply_says_whether_it_is_the_last(is_final: bool) -> None:
    response = inference_pb2.InferResponse(outputs=[tensor("Y")], final=is_final)
    reply = responses.stream_reply(response, [memoryview(b"1234")], request_id="r")
    message = kserve.ModelStreamInferResponse.FromString(reply)
    parameter = message.infer_response.parameters["triton_final_response"]
    assert parameter.WhichOneof("parameter_choice") == "bool_param"
    assert parameter.bool_param is is_final
    assert (message.error_message, message.infer_response.id) == ("", "r")
    assert message.infer_response.raw_output_contents == [b"1234"]


def test_a_stream_error_has_its_text_and_the_id_alone() -> None:
    reply = responses.stream_error(NotFound("gone"), request_id="r-9")
    assert kserve.ModelStreamInferResponse.FromString(reply) == kserve.ModelStreamInferResponse(
        error_message="gone", infer_response=kserve.ModelInferResponse(id="r-9")
    )


@pytest.mark.parametrize(
    ("error", "request_id", "expected"),
    [
        (InvalidArgument("bad"), "r-1", "[request id: r-1] bad"),
        (InvalidArgument("bad"), "", "bad"),
        (NotFound("bad"), "r-1", "bad"),
        (QueueFull("bad"), "r-1", "bad"),
    ],
)
def test_errors_about_the_content_name_the_request(
    error: ThirdrailError, request_id: str, expected: str
) -> None:
    named = status.named(error, request_id)
    assert (type(named), named.message) == (type(error), expected)


@pytest.mark.parametrize("character", ["x", "%", "\n", "ü", "𝄞"])
def test_a_text_is_cut_to_what_a_status_can_carry(character: str) -> None:
    text = status.text_of(InvalidArgument(character * 100_000))
    encoded = sum(1 if c == "x" else 3 * len(c.encode()) for c in text.removesuffix("..."))
    assert text.endswith(character + "...")
    assert 4096 - 12 < encoded <= 4096


def test_a_text_that_just_fits_is_left_whole() -> None:
    assert status.text_of(InvalidArgument("x" * 4096)) == "x" * 4096
