# SPDX-License-Identifier: Apache-2.0
"""The parameters of requests and tensors: what is passed on, and the text of every refusal."""

from typing import Any

import pytest

from support.regions import no_regions
from thirdrail.errors import InvalidArgument, Unimplemented
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.kserve.requests import native_request
from thirdrail_server.inference import grpc_service_pb2 as kserve

Request = kserve.ModelInferRequest
Parameter = kserve.InferParameter
BORDER_US = 1_000_000


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


def test_custom_parameters_of_every_type_are_passed_on() -> None:
    message = native(
        parameters={
            "b": Parameter(bool_param=False),
            "i": Parameter(int64_param=-5),
            "s": Parameter(string_param=""),
            "d": Parameter(double_param=0.5),
            "u": Parameter(uint64_param=1 << 63),
        }
    )
    assert dict(message.parameters) == {
        "b": inference_pb2.Parameter(bool_value=False),
        "i": inference_pb2.Parameter(int_value=-5),
        "s": inference_pb2.Parameter(string_value=""),
        "d": inference_pb2.Parameter(double_value=0.5),
        "u": inference_pb2.Parameter(uint_value=1 << 63),
    }


@pytest.mark.parametrize(
    "sequence_id",
    [Parameter(int64_param=7), Parameter(uint64_param=7), Parameter(string_param="seven")],
)
def test_sequence_parameters_are_accepted(sequence_id: kserve.InferParameter) -> None:
    message = native(
        parameters={
            "sequence_id": sequence_id,
            "sequence_start": Parameter(bool_param=True),
            "sequence_end": Parameter(bool_param=False),
        }
    )
    assert set(message.parameters) == {"sequence_id", "sequence_start", "sequence_end"}


@pytest.mark.parametrize("priority", [Parameter(int64_param=2), Parameter(uint64_param=2)])
def test_priority_and_timeout_leave_the_parameters(priority: kserve.InferParameter) -> None:
    message = native(parameters={"priority": priority, "timeout": Parameter(int64_param=1500)})
    assert (message.priority, message.timeout_us, len(message.parameters)) == (2, 1500, 0)


@pytest.mark.parametrize(
    ("key", "parameter", "text"),
    [
        (
            "sequence_start",
            Parameter(int64_param=1),
            "invalid value type for 'sequence_start' parameter, expected bool_param.",
        ),
        (
            "sequence_id",
            Parameter(bool_param=True),
            "invalid value type for 'sequence_id' parameter, expected int64_param or "
            "uint64_param or string_param.",
        ),
        (
            "timeout",
            Parameter(string_param="1s"),
            "invalid value type for 'timeout' parameter, expected int64_param or uint64_param.",
        ),
        (
            "timeout",
            Parameter(int64_param=-1),
            "invalid value for 'timeout' parameter, expected 0 to 9223372036854775807, got -1",
        ),
        (
            "priority",
            Parameter(int64_param=-2),
            "invalid value for 'priority' parameter, expected 0 to 4294967295, got -2",
        ),
        (
            "priority",
            Parameter(uint64_param=1 << 32),
            "invalid value for 'priority' parameter, expected 0 to 4294967295, got 4294967296",
        ),
        (
            "triton_secret",
            Parameter(bool_param=True),
            "parameter 'triton_secret' is reserved: of the keys that start with 'triton_' a "
            "request may set 'triton_enable_empty_final_response' alone",
        ),
        (
            "triton_enable_empty_final_response",
            Parameter(string_param="true"),
            "invalid value type for 'triton_enable_empty_final_response' parameter, expected "
            "bool_param.",
        ),
        ("custom", Parameter(), "parameter 'custom' has no value"),
        ("timeout", Parameter(), "parameter 'timeout' has no value"),
    ],
)
def test_bad_parameters_are_refused(key: str, parameter: kserve.InferParameter, text: str) -> None:
    assert refusal(parameters={key: parameter}) == text


def test_the_wish_for_an_empty_final_response_is_accepted_and_goes_nowhere() -> None:
    wish = {"triton_enable_empty_final_response": Parameter(bool_param=True)}
    assert not native(parameters=wish).parameters


@pytest.mark.parametrize(
    ("timeout_us", "time_left_us", "expected_us"),
    [
        (0, None, 0),
        (500, None, 500),
        (0, BORDER_US, BORDER_US),
        (500, BORDER_US, 500),
        (BORDER_US + 1, BORDER_US, BORDER_US),
        (500, 0, 1),  # a deadline that has passed must not read as "no timeout"
    ],
)
def test_the_nearer_of_timeout_and_deadline_counts(
    timeout_us: int, time_left_us: int | None, expected_us: int
) -> None:
    request = request_of(parameters={"timeout": Parameter(int64_param=timeout_us)})
    assert (
        native_request(request, regions=no_regions(), time_left_us=time_left_us)[0].timeout_us
        == expected_us
    )


# Shared memory and classification


def region(**changes: kserve.InferParameter) -> dict[str, kserve.InferParameter]:
    return {
        "shared_memory_region": Parameter(string_param="N"),
        "shared_memory_byte_size": Parameter(int64_param=8),
        **changes,
    }


def without_region(key: str) -> dict[str, kserve.InferParameter]:
    return {key: Parameter(int64_param=8)}


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            without_region("shared_memory_offset"),
            "'shared_memory_offset' can not be specified without 'shared_memory_region' "
            "parameter for tensor 'X'",
        ),
        (
            without_region("shared_memory_byte_size"),
            "'shared_memory_byte_size' can not be specified without 'shared_memory_region' "
            "parameter for tensor 'X'",
        ),
        (
            {"shared_memory_region": Parameter(string_param="N")},
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' "
            "parameter for tensor 'X'",
        ),
        (
            region(shared_memory_region=Parameter(int64_param=1)),
            "invalid value type for 'shared_memory_region' parameter for tensor 'X', expected "
            "string_param.",
        ),
        (
            region(shared_memory_offset=Parameter(string_param="0")),
            "invalid value type for 'shared_memory_offset' parameter for tensor 'X', expected "
            "int64_param.",
        ),
        (
            region(shared_memory_byte_size=Parameter(uint64_param=8)),
            "invalid value type for 'shared_memory_byte_size' parameter for tensor 'X', expected "
            "int64_param.",
        ),
    ],
)
def test_malformed_regions_are_refused_on_inputs_and_outputs(
    parameters: dict[str, kserve.InferParameter], text: str
) -> None:
    assert refusal(inputs=[input_of(parameters=parameters)]) == text
    assert refusal(outputs=[output_of(name="X", parameters=parameters)]) == text


def test_a_region_beside_contents_is_refused() -> None:
    contents = kserve.InferTensorContents(fp32_contents=[1, 2])
    tensor = input_of(parameters=region(), contents=contents)
    assert refusal(inputs=[tensor], raw_input_contents=[]) == (
        "unexpected 'content' provided when using shared memory for input tensor 'X'"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": [input_of(parameters=region())], "raw_input_contents": []},
        {"outputs": [output_of(parameters=region())]},
    ],
)
def test_where_regions_are_off_the_text_says_how_to_switch_them_on(fields: dict[str, Any]) -> None:
    with pytest.raises(Unimplemented) as caught:
        native(**fields)
    assert caught.value.message == (
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to "
        "enable."
    )


def test_classification_becomes_a_class_count() -> None:
    (output,) = native(
        outputs=[output_of(parameters={"classification": Parameter(int64_param=3)})]
    ).outputs
    assert output.class_count == 3


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            {**region(), "classification": Parameter(int64_param=1)},
            "output can't set both 'shared_memory_region' and 'classification'",
        ),
        (
            {"classification": Parameter(int64_param=0)},
            "invalid value for 'classification' parameter for tensor 'Y', expected at least 1, "
            "got 0",
        ),
        (
            {"classification": Parameter(string_param="3")},
            "invalid value type for 'classification' parameter for tensor 'Y', expected "
            "int64_param.",
        ),
    ],
)
def test_bad_classification_is_refused(
    parameters: dict[str, kserve.InferParameter], text: str
) -> None:
    assert refusal(outputs=[output_of(parameters=parameters)]) == text
