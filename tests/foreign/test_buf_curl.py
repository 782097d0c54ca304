# SPDX-License-Identifier: Apache-2.0
"""A person at a terminal: `buf curl` finds the services by reflection, with no proto file at hand.

The grpcurl lines of docs/grpc.md make the same calls.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.environments import node_environment, run
from support.server import RunningServer

pytestmark = [pytest.mark.needs_node, pytest.mark.timeout(600)]

NODE = Path(__file__).parent / "node"
NOT_FOUND = 5
INVALID_ARGUMENT = 3

REQUEST = {
    "modelName": "plus_one",
    "requestId": "by hand",
    "inputs": [
        {
            "name": "a",
            "dataType": "DATA_TYPE_FP32",
            "shape": [1, 4],
            "values": {"floats": [1, 2, 3, 4]},
        }
    ],
}

Curl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["tcp", "unix"])
def curl(request: pytest.FixtureRequest, server: RunningServer, tmp_path: Path) -> Curl:
    """curl(method, *options, data=None), in a folder without any proto file."""
    buf = node_environment("node", NODE) / "node_modules" / ".bin" / "buf"
    options = ["--protocol", "grpc", "--http2-prior-knowledge"]
    host = server.address
    if request.param == "unix":
        options += ["--unix-socket", str(server.socket)]
        host = "localhost"

    def call(method: str, *more: str, data: Any = None) -> subprocess.CompletedProcess[str]:
        given = [] if data is None else ["--data", json.dumps(data)]
        command = [str(buf), "curl", *options, *more, *given, f"http://{host}/{method}"]
        return run(command, cwd=tmp_path)

    return call


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_services_are_listed(curl: Curl) -> None:
    services = curl("", "--list-services").stdout.split()
    assert set(services) >= {
        "grpc.health.v1.Health",
        "inference.GRPCInferenceService",
        "thirdrail.v1.Inference",
        "thirdrail.v1.Metrics",
        "thirdrail.v1.Models",
    }


def test_a_model_is_called_with_typed_values(curl: Curl) -> None:
    response = answer(curl("thirdrail.v1.Inference/Infer", data=REQUEST))
    [output] = response["outputs"]
    assert output["values"] == {"floats": [2, 3, 4, 5]}
    assert (output["name"], output["shape"]) == ("c", ["1", "4"])
    assert response["requestId"] == "by hand"
    assert response["final"] is True
    assert "call" not in response  # none was sent


def test_a_stream_answers_each_request(curl: Curl) -> None:
    first = {"infer": REQUEST | {"call": 1}}
    second = {"infer": {"call": 2, "modelName": "unheard_of"}}
    done = curl(
        "thirdrail.v1.Inference/InferStream", "--data", json.dumps(first) + json.dumps(second)
    )
    assert done.returncode == 0, done.stderr
    one, two = sorted(documents(done.stdout), key=lambda response: response["infer"]["call"])
    assert one["infer"]["outputs"][0]["values"] == {"floats": [2, 3, 4, 5]}
    assert two["infer"]["status"]["reason"] == "REASON_NOT_FOUND"


def documents(text: str) -> list[Any]:
    """JSON documents written one after the other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def test_the_models_are_listed_and_described(curl: Curl) -> None:
    models = answer(curl("thirdrail.v1.Models/List"))["models"]
    states = {model["name"]: model["state"] for model in models}
    assert states["plus_one"] == "MODEL_STATE_READY"
    described = answer(curl("thirdrail.v1.Models/Describe", data={"name": "add"}))
    assert [each["name"] for each in described["inputs"]] == ["a", "b"]
    assert described["batchRowsMax"] == 8


def test_kserve_by_hand(curl: Curl) -> None:
    assert answer(curl("inference.GRPCInferenceService/ServerLive")) == {"live": True}
    request = {
        "modelName": "plus_one",
        "inputs": [
            {
                "name": "a",
                "datatype": "FP32",
                "shape": [1, 4],
                "contents": {"fp32Contents": [1, 2, 3, 4]},
            }
        ],
    }
    response = answer(curl("inference.GRPCInferenceService/ModelInfer", data=request))
    assert response["outputs"][0]["datatype"] == "FP32"


def test_health(curl: Curl) -> None:
    assert answer(curl("grpc.health.v1.Health/Check")) == {"status": "SERVING"}


@pytest.mark.parametrize(
    ("request_data", "code", "text"),
    [
        ({"modelName": "unheard_of"}, NOT_FOUND, "'unheard_of' is not found"),
        ({"modelName": "plus_one"}, INVALID_ARGUMENT, "missing required input(s) ['a']"),
    ],
)
def test_a_mistake_is_explained(
    curl: Curl, request_data: dict[str, Any], code: int, text: str
) -> None:
    done = curl("thirdrail.v1.Inference/Infer", data=request_data)
    assert done.returncode == code << 3
    assert text in json.loads(done.stderr)["message"]
