# SPDX-License-Identifier: Apache-2.0
"""The log of a running server: one event a line, failed requests by their ids, JSON where asked."""

import json
from pathlib import Path

import grpc
import numpy as np
import pytest

from conftest import StartServer
from support.models import positives, write
from support.server import RunningServer
from thirdrail import Client, ThirdrailError
from thirdrail.errors import Internal, InvalidArgument
from thirdrail.tensors import Array
from thirdrail.transport import TransportChoice
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

BELOW = np.array([[-1], [2]], np.float32)  # one row comes back for two: the model does not batch
SHAPELESS = np.zeros(2, np.float32)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write(folder, "positives", positives(), "max_batch_size: 4")
    return folder


WAYS = pytest.mark.parametrize(("way", "process"), [("grpc", "front"), ("lane", "worker cpu")])


def fail(server: RunningServer, x: Array, request_id: str, way: TransportChoice) -> ThirdrailError:
    with Client(server.url, transport=way) as client, pytest.raises(ThirdrailError) as raised:
        client.infer("positives", {"x": x}, request_id=request_id)
    return raised.value


def fail_by_kserve(server: RunningServer, request_id: str) -> None:
    request = kserve.ModelInferRequest(model_name="positives", id=request_id)
    x = request.inputs.add(name="x", datatype="FP32", shape=[*BELOW.shape])
    x.contents.fp32_contents.extend(BELOW.ravel())
    with server.channel() as channel, pytest.raises(grpc.RpcError):
        GRPCInferenceServiceStub(channel).ModelInfer(request)


@pytest.mark.slow
@WAYS
def test_requests_that_we_failed_are_logged_with_their_id(
    repository: Path, start_server: StartServer, way: TransportChoice, process: str
) -> None:
    server = start_server(repository)
    assert isinstance(fail(server, BELOW, "order-1", way), Internal)
    assert isinstance(fail(server, SHAPELESS, "order-2", way), InvalidArgument)
    fail_by_kserve(server, "order-3")
    failed = [line for line in server.log_text().splitlines() if "a request failed" in line]
    assert ["order-1" in line or "order-3" in line for line in failed] == [True, True]
    assert f"warning {process}: a request failed: " in failed[0]
    assert failed[0].endswith("request_id='order-1' model='positives' reason='INTERNAL'")


@pytest.mark.slow
@WAYS
def test_every_line_is_json_and_at_debug_refusals_are_there(
    repository: Path, start_server: StartServer, way: TransportChoice, process: str
) -> None:
    server = start_server(repository, "--log-format=json", "--log-level=debug")
    error = fail(server, SHAPELESS, "order-2", way)
    server.stop()
    events = [json.loads(line) for line in server.log_text().splitlines()]
    assert not [each for each in events if each.get("logger", "").startswith("grpc.")]
    [event] = [each for each in events if each.get("request_id") == "order-2"]
    assert (event["process"], event["level"], event["model"], event["reason"]) == (
        process,
        "debug",
        "positives",
        "INVALID_ARGUMENT",
    )
    assert event["message"] == f"a request failed: {error}"
    assert {each["process"] for each in events} == {"front", "worker cpu"}
