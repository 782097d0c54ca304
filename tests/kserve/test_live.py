# SPDX-License-Identifier: Apache-2.0
"""KServe against a real server with real models: the texts and results that foreign clients see."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from conftest import StartServer
from support.models import add, classifier, identity, slow, write
from support.server import RunningServer
from thirdrail.dtypes import BY_NAME, decode_bytes, encode_bytes
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

Status = grpc.StatusCode
Input = kserve.ModelInferRequest.InferInputTensor
Output = kserve.ModelInferRequest.InferRequestedOutputTensor
Parameter = kserve.InferParameter
Override = kserve.ModelRepositoryParameter
Stub = Any  # the generated one, whose calls are typed for both kinds of channel

NUMBERS = [row for row in BY_NAME.values() if row.itemsize]


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[Stub]:
    with server.channel() as channel:
        yield GRPCInferenceServiceStub(channel)


def request_of(
    model: str, *tensors: tuple[str, str, list[int], bytes], **fields: Any
) -> kserve.ModelInferRequest:
    """tensors: name, datatype, shape and raw bytes of each input."""
    return kserve.ModelInferRequest(
        model_name=model,
        inputs=[Input(name=name, datatype=kind, shape=shape) for name, kind, shape, _ in tensors],
        raw_input_contents=[raw for *_, raw in tensors],
        **fields,
    )


def failure(stub: Stub, request: kserve.ModelInferRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=20)
    return status_of(caught.value)


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details() or ""


# Results


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda row: row.name)
@pytest.mark.parametrize("count", [0, 3, 100_000])
def test_every_type_comes_back_bit_by_bit(stub: Stub, dtype: Any, count: int) -> None:
    raw = np.arange(count).astype(np.uint8).repeat(dtype.itemsize).tobytes()
    if dtype.name == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    model = f"identity_{dtype.name.lower()}"
    reply = stub.ModelInfer(request_of(model, ("x", dtype.name, [count], raw), id="r"))
    assert reply.raw_output_contents == [raw]
    assert not reply.outputs[0].HasField("contents")
    assert (reply.id, reply.model_name, reply.model_version) == ("r", model, "1")
    assert (reply.outputs[0].name, reply.outputs[0].datatype) == ("y", dtype.name)
    assert list(reply.outputs[0].shape) == [count]


@pytest.mark.parametrize("elements", [[], [b"", b"a\0b"], [b"x" * 70_000, "ü".encode()]])
def test_bytes_come_back_element_by_element(stub: Stub, elements: list[bytes]) -> None:
    raw = encode_bytes(elements)
    reply = stub.ModelInfer(request_of("identity_bytes", ("x", "BYTES", [len(elements)], raw)))
    assert decode_bytes(reply.raw_output_contents[0], len(elements)) == elements


def test_typed_contents_are_answered_raw(stub: Stub) -> None:
    contents = kserve.InferTensorContents(int_contents=[-1, 2])
    tensor = Input(name="x", datatype="INT8", shape=[2], contents=contents)
    reply = stub.ModelInfer(kserve.ModelInferRequest(model_name="identity_int8", inputs=[tensor]))
    assert reply.raw_output_contents == [b"\xff\x02"]


SCORES = np.array([[0.1, 0.7, 0.2], [3, 1, 2]], np.float32).tobytes()


def test_classification_gives_the_best_classes_with_their_labels(stub: Stub) -> None:
    wanted = Output(name="scores", parameters={"classification": Parameter(int64_param=2)})
    request = request_of("classifier", ("x", "FP32", [2, 3], SCORES), outputs=[wanted])
    (output,), (raw,) = (reply := stub.ModelInfer(request)).outputs, reply.raw_output_contents
    assert (output.datatype, list(output.shape)) == ("BYTES", [2, 2])
    assert decode_bytes(raw, 4) == [
        b"0.700000:1:dog",
        b"0.200000:2:fish",
        b"3.000000:0:cat",
        b"2.000000:2:fish",
    ]


def test_classification_of_bytes_is_refused(stub: Stub) -> None:
    wanted = Output(name="y", parameters={"classification": Parameter(int64_param=2)})
    request = request_of("identity_bytes", ("x", "BYTES", [0], b""), outputs=[wanted])
    code, text = failure(stub, request)
    assert code is Status.INVALID_ARGUMENT
    assert text == "class result not available for output due to unsupported type 'BYTES'"


# Refusals


ROW = b"\0" * 16
A = ("a", "FP32", [1, 4], ROW)
B = ("b", "FP32", [1, 4], ROW)


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (
            request_of("add", A),
            "expected 2 inputs but got 1 inputs for model 'add'. Got input(s) ['a'], but missing "
            "required input(s) ['b']. Please provide all required input(s).",
        ),
        (request_of("add", A, ("z", *B[1:])), "missing required input(s) ['b']"),
        (request_of("plus_one", A, A), "input 'a' already exists in request"),
        (
            request_of("plus_one", A, outputs=[Output(name="O")]),
            "unexpected inference output 'O' for model 'plus_one'",
        ),
        (
            request_of("plus_one", A, outputs=[Output(name="c"), Output(name="c")]),
            "output 'c' already exists in request",
        ),
        (
            request_of("plus_one", ("a", "INT32", [1, 4], ROW)),
            "inference input 'a' data-type is 'INT32', but model 'plus_one' expects 'FP32'",
        ),
        (
            request_of("plus_one", ("a", "FP32", [1, 8], ROW)),
            "unexpected shape for input 'a' for model 'plus_one'. Expected [-1,4], got [1,8].",
        ),
        (
            request_of("add", A, ("b", "FP32", [2, 4], ROW * 2)),
            "input 'b' batch size does not match other inputs for 'add'",
        ),
        (
            request_of("add", ("a", "FP32", [9, 4], ROW * 9), ("b", "FP32", [9, 4], ROW * 9)),
            "inference request batch-size must be <= 8 for 'add'",
        ),
        (
            request_of("plus_one", ("a", "FP32", [1, 4], ROW * 2)),
            "input byte size mismatch for input 'a' for model 'plus_one'. Expected 16, got 32",
        ),
        (
            request_of("identity_bytes", ("x", "BYTES", [2], encode_bytes([b"a"]))),
            "expected 2 string elements for inference input 'x' for model 'identity_bytes', got 1",
        ),
        (
            request_of("identity_bytes", ("x", "BYTES", [1], encode_bytes([b"a", b"b"]))),
            "unexpected number of string elements 2 for inference input 'x' for model "
            "'identity_bytes', expecting 1",
        ),
        (
            request_of("identity_bytes", ("x", "BYTES", [1], b"\1\0")),
            "incomplete string length indicator for inference input 'x' for model",
        ),
        (request_of("identity_fp32", ("x", "FP32", [-1], b"")), "negative dimension"),
        (request_of("plus_one", ("a", "FP32", [1 << 62, 4], ROW)), "elements"),
        (request_of("plus_one", ("a", "FP32", [(1 << 63) - 1, 4], ROW)), "elements"),
        (
            request_of("gather", ("index", "INT64", [1], np.int64(9).tobytes())),
            "the model cannot compute with 'index' [1]: Gather node: ",  # Triton: INTERNAL
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
    stub: Stub, request_: kserve.ModelInferRequest, part: str
) -> None:
    code, text = failure(stub, request_)
    assert code is Status.INVALID_ARGUMENT
    assert part in text
    assert not text.startswith("[request id: ")
    request_.id = "r-7"
    assert failure(stub, request_)[1] == f"[request id: r-7] {text}"


@pytest.mark.parametrize(
    ("model", "version", "status", "text"),
    [
        ("none", "", Status.NOT_FOUND, "Request for unknown model: 'none' is not found"),
        ("plus_one", "9", Status.NOT_FOUND, "'plus_one' version 9 is not found"),
        ("plus_one", "one", Status.INVALID_ARGUMENT, "version should be an integral value > 0"),
    ],
)
def test_models_and_versions_that_are_not_there(
    stub: Stub, model: str, version: str, status: grpc.StatusCode, text: str
) -> None:
    code, got = failure(stub, request_of(model, A, model_version=version))
    assert code is status
    assert text in got


def slow_request(model: str, turns: int, **fields: Any) -> kserve.ModelInferRequest:
    count = np.array(turns, np.int64).tobytes()
    return request_of(model, ("x", "FP32", [1], ROW[:4]), ("turns", "INT64", [], count), **fields)


def statistics_of(stub: Stub, model: str) -> kserve.ModelStatistics:
    reply: kserve.ModelStatisticsResponse = stub.ModelStatistics(
        kserve.ModelStatisticsRequest(name=model)
    )
    (found,) = reply.model_stats
    return found


@pytest.mark.slow
def test_a_full_queue_and_an_expired_timeout_are_unavailable(server: RunningServer) -> None:
    """One request runs, one waits with a timeout, the third finds the queue full."""
    soon = {"timeout": Parameter(int64_param=1_000_000)}
    with server.channel() as channel:
        stub: Stub = GRPCInferenceServiceStub(channel)
        runs = stub.ModelInfer.future(slow_request("narrow", 400_000, id="runs"))
        wait_until(channel, running=1, queued=0)
        waits = stub.ModelInfer.future(slow_request("narrow", 1, parameters=soon))
        wait_until(channel, running=1, queued=1)
        assert failure(stub, slow_request("narrow", 1)) == (
            Status.UNAVAILABLE,
            "Exceeds maximum queue size",
        )
        assert waits.code() is Status.UNAVAILABLE
        assert waits.details() == "Request timeout expired"
        assert runs.result().id == "runs"


def wait_until(channel: grpc.Channel, *, running: int, queued: int) -> None:
    """Until the model `narrow` has so many requests."""
    metrics = metrics_pb2_grpc.MetricsStub(channel)
    while True:
        models = metrics.Snapshot(metrics_pb2.SnapshotRequest()).models
        narrow = next((each for each in models if each.name == "narrow"), None)
        if narrow is not None and (narrow.running, narrow.queued) == (running, queued):
            return


# Streams


def test_one_stream_carries_many_models_and_errors_in_band(stub: Stub) -> None:
    requests = [
        slow_request("slow", 2_000, id="slow"),
        request_of("plus_one", A, id="quick"),
        request_of("none", A, id="bad"),
        request_of("identity_fp32", ("x", "FP32", [4], ROW), id="last"),
    ]
    replies = list(stub.ModelStreamInfer(iter(requests), timeout=60))
    assert [each.infer_response.id for each in replies] == ["slow", "quick", "bad", "last"]
    assert [each.error_message for each in replies] == [
        "",
        "",
        "Request for unknown model: 'none' is not found",
        "",
    ]
    assert replies[1].infer_response.raw_output_contents == [np.ones(4, np.float32).tobytes()]
    assert replies[1].infer_response.parameters["triton_final_response"].bool_param


# Descriptions


def test_metadata_and_configuration_of_every_model_agree(stub: Stub) -> None:
    index = stub.RepositoryIndex(kserve.RepositoryIndexRequest(ready=True)).models
    assert len(index) >= len(BY_NAME)
    for entry in index:
        metadata = stub.ModelMetadata(kserve.ModelMetadataRequest(name=entry.name))
        config = stub.ModelConfig(kserve.ModelConfigRequest(name=entry.name)).config
        assert metadata.name == config.name == entry.name
        assert metadata.platform == config.platform
        lead = [-1] if config.max_batch_size else []
        assert [(t.name, list(t.shape)) for t in metadata.inputs] == [
            (t.name, [*lead, *t.dims]) for t in config.input
        ]
        assert [t.name for t in metadata.outputs] == [t.name for t in config.output]


def test_statistics_count_what_was_done(stub: Stub) -> None:
    before = statistics_of(stub, "add")
    pair = [("a", "FP32", [3, 4], ROW * 3), ("b", "FP32", [3, 4], ROW * 3)]
    stub.ModelInfer(request_of("add", *pair))
    after = statistics_of(stub, "add")
    assert after.inference_count == before.inference_count + 3
    assert after.execution_count == before.execution_count + 1
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.last_inference > 1_600_000_000_000
    assert 3 in [batch.batch_size for batch in after.batch_stats]


def test_without_model_control_nothing_can_be_loaded(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest(model_name="add"))
    code, text = status_of(caught.value)
    assert code is Status.UNAVAILABLE
    assert "explicit model load / unload is not allowed" in text


def test_models_are_loaded_replaced_and_unloaded_by_calls(
    tmp_path: Path, start_server: StartServer
) -> None:
    write(tmp_path, "first", identity())
    write(tmp_path, "second", slow())
    server = start_server(tmp_path, "--model-control=explicit", "--load-model=*")
    with server.channel() as channel:
        control: Stub = GRPCInferenceServiceStub(channel)
        load, unload = kserve.RepositoryModelLoadRequest, kserve.RepositoryModelUnloadRequest
        graph = Override(bytes_param=classifier().SerializeToString())
        uploaded = {
            "config": Override(string_param='{"max_batch_size": "4"}'),
            "file:1/model.onnx": graph,
        }
        control.RepositoryModelLoad(load(model_name="first", parameters=uploaded))
        config = control.ModelConfig(kserve.ModelConfigRequest(name="first")).config
        assert (config.max_batch_size, config.output[0].name) == (4, "scores")
        broken = {
            **uploaded,
            "file:1/model.onnx": kserve.ModelRepositoryParameter(bytes_param=b"?"),
        }
        with pytest.raises(grpc.RpcError) as caught:
            control.RepositoryModelLoad(load(model_name="first", parameters=broken))
        code, text = status_of(caught.value)
        assert code is Status.INTERNAL
        assert text.startswith("failed to load 'first', ")
        assert control.ModelReady(kserve.ModelReadyRequest(name="first")).ready
        control.RepositoryModelUnload(unload(model_name="first"))
        while index_of(control)["first"] != ("UNAVAILABLE", "unloaded"):
            time.sleep(0.02)
        assert not control.ModelReady(kserve.ModelReadyRequest(name="first")).ready
        assert index_of(control)["second"] == ("READY", "")
        write(tmp_path, "third", add())
        control.RepositoryModelLoad(load(model_name="third"))
        assert index_of(control)["third"] == ("READY", "")
        with pytest.raises(grpc.RpcError) as caught:
            control.RepositoryModelLoad(load(model_name="fourth"))
        code, text = status_of(caught.value)
        assert code is Status.INTERNAL
        assert text.startswith("failed to load 'fourth', failed to poll from model repository")


def index_of(stub: Stub) -> dict[str, tuple[str, str]]:
    index = stub.RepositoryIndex(kserve.RepositoryIndexRequest()).models
    return {entry.name: (entry.state, entry.reason) for entry in index}
