# SPDX-License-Identifier: Apache-2.0
"""Whatever a client sends becomes a whole native request or a clean refusal, nothing else."""

import json
from typing import Any

from google.protobuf.message import DecodeError
from hypothesis import event, given, settings
from hypothesis import strategies as st

from support.regions import no_regions
from thirdrail.dtypes import BY_NAME, BY_VALUE, decode_bytes
from thirdrail.errors import InvalidArgument, Unimplemented
from thirdrail.lane.input_arena import bytes_of
from thirdrail.v1 import inference_pb2
from thirdrail_server.front.kserve import repository
from thirdrail_server.front.kserve.requests import native_request
from thirdrail_server.inference import grpc_service_pb2 as kserve

Request = kserve.ModelInferRequest
TIME_LEFT_US = 10_000

names = st.sampled_from(["X", "Y", "", "ü"])
int32s = st.integers(-(1 << 31), (1 << 31) - 1)
int64s = st.integers(-(1 << 63), (1 << 63) - 1)
uint64s = st.integers(0, (1 << 64) - 1)

inference_parameters = st.one_of(
    st.builds(kserve.InferParameter),
    st.builds(kserve.InferParameter, bool_param=st.booleans()),
    st.builds(kserve.InferParameter, int64_param=int64s | st.integers(0, 4)),
    st.builds(kserve.InferParameter, uint64_param=uint64s),
    st.builds(kserve.InferParameter, string_param=st.text(max_size=4)),
    st.builds(kserve.InferParameter, double_param=st.floats()),
)
request_keys = st.sampled_from(
    [
        "priority",
        "timeout",
        "sequence_id",
        "sequence_start",
        "triton_enable_empty_final_response",
        "triton_x",
        "custom",
        "",
    ]
)
tensor_keys = st.sampled_from(
    [
        "shared_memory_region",
        "shared_memory_offset",
        "shared_memory_byte_size",
        "classification",
        "other",
    ]
)
contents = st.builds(
    kserve.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=2),
    int_contents=st.lists(int32s, max_size=2),
    int64_contents=st.lists(int64s, max_size=1),
    uint_contents=st.lists(st.integers(0, (1 << 32) - 1), max_size=1),
    uint64_contents=st.lists(uint64s, max_size=1),
    fp32_contents=st.lists(st.floats(width=32), max_size=1),
    fp64_contents=st.lists(st.floats(), max_size=1),
    bytes_contents=st.lists(st.binary(max_size=5), max_size=1),
) | st.builds(kserve.InferTensorContents, int_contents=st.lists(int32s, max_size=3))
input_tensors = st.builds(
    Request.InferInputTensor,
    name=names,
    datatype=st.sampled_from([*BY_NAME, "", "FP8"]),
    shape=st.lists(int64s, max_size=3),
    parameters=st.dictionaries(tensor_keys, inference_parameters, max_size=2),
    contents=st.none() | contents,
)
output_tensors = st.builds(
    Request.InferRequestedOutputTensor,
    name=names,
    parameters=st.dictionaries(tensor_keys, inference_parameters, max_size=2),
)
requests = st.builds(
    Request,
    model_name=names,
    model_version=st.sampled_from(["", "1", "x", "-1", "99999999999999999999"]),
    id=st.text(max_size=3),
    parameters=st.dictionaries(request_keys, inference_parameters, max_size=2),
    inputs=st.lists(input_tensors, max_size=3),
    outputs=st.lists(output_tensors, max_size=2),
    raw_input_contents=st.lists(st.binary(max_size=9), max_size=3),
)

valid_requests = st.builds(
    Request,
    model_name=names,
    id=names,
    parameters=st.just({"priority": kserve.InferParameter(int64_param=1)}),
    inputs=st.lists(
        st.builds(
            Request.InferInputTensor,
            name=names,
            datatype=st.sampled_from(sorted(BY_NAME)),
            shape=st.lists(st.integers(0, 300), max_size=2),
        ),
        max_size=2,
    ),
    raw_input_contents=st.lists(st.binary(max_size=9), min_size=2, max_size=2),
)


def check(request: kserve.ModelInferRequest) -> None:
    try:
        native, data = native_request(request, regions=no_regions(), time_left_us=TIME_LEFT_US)
    except (InvalidArgument, Unimplemented) as error:
        event(type(error).__name__)
        return
    event("translated")
    assert inference_pb2.InferRequest.FromString(native.SerializeToString()) == native
    assert [tensor.name for tensor in native.inputs] == [t.name for t in request.inputs]
    assert all(tensor.data_type in BY_VALUE for tensor in native.inputs)
    assert all(tensor.WhichOneof("data") is None for tensor in native.inputs)
    assert len(data) == len(native.inputs)
    assert all(isinstance(each, bytes) for each in data)
    assert 1 <= native.timeout_us <= TIME_LEFT_US
    assert not any(key.startswith("triton_") for key in native.parameters)
    assert all(each.WhichOneof("value") for each in native.parameters.values())


@settings(max_examples=300, deadline=None)
@given(requests)
def test_any_request_is_translated_or_refused(request: kserve.ModelInferRequest) -> None:
    check(request)


@settings(max_examples=300, deadline=None)
@given(valid_requests, st.data())
def test_bytes_changed_on_the_way_are_translated_or_refused(
    request: kserve.ModelInferRequest, draw: st.DataObject
) -> None:
    body = bytearray(request.SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        position = draw.draw(st.integers(0, len(body) - 1))
        body[position : position + 1] = draw.draw(st.binary(min_size=1, max_size=1))
    try:
        mutated = Request.FromString(bytes(body))
    except DecodeError:
        event("not a message")
        return
    check(mutated)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=20))
def test_bytes_elements_come_out_as_they_went_in(elements: list[bytes]) -> None:
    tensor = Request.InferInputTensor(
        name="X",
        datatype="BYTES",
        shape=[len(elements)],
        contents=kserve.InferTensorContents(bytes_contents=elements),
    )
    _, (raw,) = native_request(Request(inputs=[tensor]), regions=no_regions(), time_left_us=None)
    assert raw is not None
    assert decode_bytes(bytes_of(raw), len(elements)) == elements


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "input", "dims", "maxBatchSize", "parameters", "instanceGroup"]
            )
            | st.text(max_size=5),
            values,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_any_json_describes_a_model_or_is_refused(value: Any) -> None:
    parameters = {"config": kserve.ModelRepositoryParameter(string_param=json.dumps(value))}
    try:
        overrides = repository.load_overrides("M", parameters)
    except InvalidArgument:
        event("refused")
        return
    event("a model")
    assert overrides.config is not None
    assert overrides.config.name == "M"
