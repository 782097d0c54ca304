# SPDX-License-Identifier: Apache-2.0
"""What only sessions on the lane may say is refused over gRPC, whoever says it."""

from collections.abc import Callable

import grpc
import pytest

from support.server import RunningServer
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import inference_pb2_grpc, tensor_pb2
from thirdrail_server.front.native_messages import refuse_references

Spoil = Callable[[pb.InferRequest], object]

LANE_ONLY: dict[str, tuple[Spoil, str]] = {
    "inputs.ref": (lambda it: it.inputs[0].ref.SetInParent(), "'x' is a memory reference"),
    "inputs.region": (lambda it: it.inputs[0].region.SetInParent(), "'x' is a memory reference"),
    "outputs.on_device": (lambda it: it.outputs.add(name="y", on_device=True), "'y' is wanted in"),
    "outputs.region": (
        lambda it: it.outputs.add(name="y").region.SetInParent(),
        "'y' is wanted in",
    ),
    "event_place": (lambda it: setattr(it, "event_place", 1), "event_place means nothing"),
}
FOR_EVERYBODY = {
    "": {
        "model_name", "model_version", "model_id", "call", "request_id", "inputs", "outputs",
        "parameters", "priority", "timeout_us", "traceparent",
    },
    "inputs.": {"name", "data_type", "shape", "raw", "values"},
    "outputs.": {"name", "form", "class_count"},
}  # fmt: skip


def request() -> pb.InferRequest:
    tensor = tensor_pb2.Tensor(
        name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[1], raw=bytes(4)
    )
    return pb.InferRequest(model_name="identity", inputs=[tensor])


def test_every_field_is_for_everybody_or_for_the_lane() -> None:
    """A new one must be put here, and looked at when it is."""
    for prefix, kind in (("", pb.InferRequest), ("inputs.", tensor_pb2.Tensor),
                         ("outputs.", pb.RequestedOutput)):  # fmt: skip
        fields = {field.name for field in kind.DESCRIPTOR.fields}
        only = {name.removeprefix(prefix) for name in LANE_ONLY
                if name.startswith(prefix) and "." not in name.removeprefix(prefix)}  # fmt: skip
        assert fields == FOR_EVERYBODY[prefix] | only
        assert not FOR_EVERYBODY[prefix] & only


def test_an_ordinary_request_passes() -> None:
    refuse_references(request())


@pytest.mark.parametrize("field", LANE_ONLY)
def test_the_lane_s_own_is_refused(field: str) -> None:
    spoil, text = LANE_ONLY[field]
    spoilt = request()
    spoil(spoilt)
    with pytest.raises(InvalidArgument, match=text):
        refuse_references(spoilt)


@pytest.mark.parametrize("field", LANE_ONLY)
def test_it_is_refused_by_a_server_alone_and_on_a_stream(server: RunningServer, field: str) -> None:
    spoil, text = LANE_ONLY[field]
    spoilt = request()
    spoil(spoilt)
    with grpc.insecure_channel(server.url) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Infer(spoilt, timeout=60)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in (refused.value.details() or "")
        (answer,) = stub.InferStream(iter([pb.InferStreamRequest(infer=spoilt)]), timeout=60)
        assert answer.infer.status.reason == pb.REASON_INVALID_ARGUMENT
        assert text in answer.infer.status.message
