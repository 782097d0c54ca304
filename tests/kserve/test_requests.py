# SPDX-License-Identifier: Apache-2.0
"""A ModelInferRequest as the dispatcher gets it, and the text of every refusal at this border."""

from typing import Any

import numpy as np
import pytest

from support.regions import no_regions
from thirdrail.dtypes import DTYPES, decode_bytes
from thirdrail.errors import InvalidArgument
from thirdrail.lane.input_arena import bytes_of
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.front.kserve.requests import native_request
from thirdrail_server.inference import grpc_service_pb2 as kserve

Request = kserve.ModelInferRequest


def request_of(**fields: Any) -> Request:
    """A valid request with one raw FP32 input, changed by `fields`."""
    valid: dict[str, Any] = {
        "model_name": "M",
        "inputs": [Request.InferInputTensor(name="X", datatype="FP32", shape=[2])],
        "raw_input_contents": [b"\0" * 8],
    }
    return Request(**{**valid, **fields})


def native(**fields: Any) -> inference_pb2.InferRequest:
    return native_request(request_of(**fields), regions=no_regions(), time_left_us=None)[0]


def refusal(**fields: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        native(**fields)
    return caught.value.message


def input_of(**fields: Any) -> Request.InferInputTensor:
    return Request.InferInputTensor(**{"name": "X", "datatype": "FP32", "shape": [2], **fields})


def output_of(**fields: Any) -> Request.InferRequestedOutputTensor:
    return Request.InferRequestedOutputTensor(**{"name": "Y", **fields})


def test_every_part_of_a_request_arrives() -> None:
    request = Request(
        model_name="M",
        model_version="3",
        id="r-1",
        inputs=[
            input_of(name="A", datatype="INT64", shape=[1, 2]),
            input_of(name="B", datatype="BYTES", shape=[1]),
        ],
        outputs=[output_of(name="Y")],
        raw_input_contents=[b"a" * 16, b"\x01\0\0\0b"],
    )

    message, data = native_request(request, regions=no_regions(), time_left_us=None)

    assert message == inference_pb2.InferRequest(
        model_name="M",
        model_version=3,
        request_id="r-1",
        inputs=[
            tensor_pb2.Tensor(name="A", data_type=tensor_pb2.DATA_TYPE_INT64, shape=[1, 2]),
            tensor_pb2.Tensor(name="B", data_type=tensor_pb2.DATA_TYPE_BYTES, shape=[1]),
        ],
        outputs=[inference_pb2.RequestedOutput(name="Y", form=inference_pb2.OUTPUT_FORM_RAW)],
    )
    assert data == [b"a" * 16, b"\x01\0\0\0b"]


def test_no_outputs_named_means_all() -> None:
    assert not native().outputs


def test_an_empty_version_leaves_the_choice_to_the_server() -> None:
    assert native(model_version="").model_version == 0


@pytest.mark.parametrize("version", ["x", "0", "-1", "1.0", " 1", "1_0", "٣", "9" * 19, "9" * 5000])
def test_a_version_is_an_integer_above_zero(version: str) -> None:
    text = refusal(model_version=version)
    assert text.startswith("failed to get model version from specified version string '")
    assert text.endswith("), version should be an integral value > 0")
    assert "(details: " in text


@pytest.mark.parametrize("name", [row.name for row in DTYPES])
def test_every_datatype_has_its_number(name: str) -> None:
    (tensor,) = native(inputs=[input_of(datatype=name)]).inputs
    assert tensor.data_type == tensor_pb2.DataType.Value(f"DATA_TYPE_{name}")


def test_an_unknown_datatype_is_named() -> None:
    text = refusal(inputs=[input_of(datatype="FP8")])
    assert text.startswith("inference input 'X' for model 'M' has the unknown data-type 'FP8'")


# Raw entries and typed contents


def test_raw_entries_belong_to_inputs_in_order_and_extra_ones_are_ignored() -> None:
    request = request_of(
        inputs=[input_of(name="A"), input_of(name="B")], raw_input_contents=[b"1", b"2", b"3"]
    )
    assert native_request(request, regions=no_regions(), time_left_us=None)[1] == [b"1", b"2"]


def test_contents_beside_raw_entries_are_refused() -> None:
    contents = kserve.InferTensorContents(fp32_contents=[1, 2])
    assert refusal(inputs=[input_of(contents=contents)]) == (
        "contents field must not be specified when using raw_input_contents for 'X' for model 'M'"
    )


@pytest.mark.parametrize("inputs", [1, 2])
def test_an_input_without_data_is_refused(inputs: int) -> None:
    raw = [b"\0" * 8] * (inputs - 1)
    text = refusal(inputs=[input_of()] * inputs, raw_input_contents=raw)
    assert text == "unable to find data for input tensor 'X' for model 'M' in request."


def raw_of(datatype: str, **contents: Any) -> bytes:
    tensor = input_of(datatype=datatype, contents=kserve.InferTensorContents(**contents))
    request = request_of(inputs=[tensor], raw_input_contents=[])
    _, (raw,) = native_request(request, regions=no_regions(), time_left_us=None)
    assert raw is not None
    return bytes_of(raw)


@pytest.mark.parametrize(
    ("field", "datatype", "elements"),
    [
        ("bool_contents", "BOOL", [True, False]),
        ("int_contents", "INT8", [-128, 127]),
        ("int_contents", "INT16", [-(1 << 15), (1 << 15) - 1]),
        ("int_contents", "INT32", [-(1 << 31), (1 << 31) - 1]),
        ("int64_contents", "INT64", [-(1 << 63), (1 << 63) - 1]),
        ("uint_contents", "UINT8", [0, 255]),
        ("uint_contents", "UINT16", [0, (1 << 16) - 1]),
        ("uint_contents", "UINT32", [0, (1 << 32) - 1]),
        ("uint64_contents", "UINT64", [0, (1 << 64) - 1]),
        ("fp32_contents", "FP32", [1.5, float("inf")]),
        ("fp64_contents", "FP64", [0.1, -0.0]),
    ],
)
def test_typed_contents_become_raw_bytes(field: str, datatype: str, elements: list[float]) -> None:
    expected = np.array(elements, dtype=next(r.numpy for r in DTYPES if r.name == datatype))
    assert raw_of(datatype, **{field: elements}) == expected.tobytes()


def test_bytes_contents_get_length_prefixes() -> None:
    elements = [b"", b"a\0b", b"\xff" * 300]
    raw = raw_of("BYTES", bytes_contents=elements)
    assert raw[4:8] == b"\x03\0\0\0"
    assert decode_bytes(raw, 3) == elements


def test_empty_contents_are_a_tensor_without_elements() -> None:
    assert raw_of("FP32") == b""


@pytest.mark.parametrize(
    ("datatype", "contents", "expected"),
    [
        ("INT32", {"bool_contents": [True]}, "'BOOL'"),
        ("FP16", {"fp32_contents": [1.0]}, "'FP32'"),
        ("BF16", {"fp32_contents": [1.0]}, "'FP32'"),
        ("INT64", {"int_contents": [1]}, "'INT8' or 'INT16' or 'INT32'"),
        ("FP32", {"fp32_contents": [1.0], "bytes_contents": [b"x"]}, "'BYTES'"),
        ("nonsense", {"fp64_contents": [1.0]}, "'FP64'"),
    ],
)
def test_contents_of_another_type_are_refused(
    datatype: str, contents: dict[str, Any], expected: str
) -> None:
    tensor = input_of(datatype=datatype, contents=kserve.InferTensorContents(**contents))
    assert refusal(inputs=[tensor], raw_input_contents=[]) == (
        "unexpected explicit tensor data for input tensor 'X' for model 'M' of type "
        f"'{datatype}', expected datatype {expected}"
    )


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [
        ("INT8", "int_contents", 128),
        ("INT16", "int_contents", -32769),
        ("UINT8", "uint_contents", 256),
    ],
)
def test_an_integer_that_does_not_fit_is_refused_not_wrapped(
    datatype: str, field: str, value: int
) -> None:
    elements: dict[str, Any] = {field: [1, value]}
    tensor = input_of(datatype=datatype, contents=kserve.InferTensorContents(**elements))
    text = refusal(inputs=[tensor], raw_input_contents=[])
    assert text == f"input tensor 'X' for model 'M': {value} does not fit {datatype}"
