# SPDX-License-Identifier: Apache-2.0
"""tritonclient's model control against a server with --model-control explicit.

Expects the models add and plus_one to be loaded and nothing else, and in the environment variable
PLUS_ONE_FILE the path of the latter's ONNX file.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import assert_refused, inputs, ones

UNLOADED_S_MAX = 30


def _states(client: triton.InferenceServerClient) -> dict[str, tuple[str, str]]:
    index = client.get_model_repository_index().models
    return {each.name: (each.state, each.reason) for each in index}


def _unload(client: triton.InferenceServerClient, name: str) -> None:
    """Unloading may end after the call; the index says when it has."""
    client.unload_model(name)
    deadline = time.monotonic() + UNLOADED_S_MAX
    while _states(client)[name] != ("UNAVAILABLE", "unloaded"):
        assert time.monotonic() < deadline, _states(client)[name]
        time.sleep(0.02)


def check_load_and_unload(url: str) -> None:
    rows = inputs(x=np.ones(2, np.float32))
    with triton.InferenceServerClient(url) as client:
        assert not client.is_model_ready("identity_fp32")
        client.load_model("identity_fp32")
        assert client.is_model_ready("identity_fp32")
        assert _states(client)["identity_fp32"] == ("READY", "")
        assert client.infer("identity_fp32", rows).as_numpy("y").tolist() == [1, 1]
        _unload(client, "identity_fp32")
        assert not client.is_model_ready("identity_fp32")
        assert_refused(
            lambda: client.infer("identity_fp32", rows), "NOT_FOUND", "has no available versions"
        )


def check_reload_with_another_configuration(url: str) -> None:
    rows = np.ones((9, 4), np.float32)
    config = {
        "name": "add",
        "max_batch_size": "16",
        "input": [
            {"name": "a", "data_type": "TYPE_FP32", "dims": [4]},
            {"name": "b", "data_type": "TYPE_FP32", "dims": [4]},
        ],
        "output": [{"name": "c", "data_type": "TYPE_FP32", "dims": [4]}],
    }
    with triton.InferenceServerClient(url) as client:
        text = "batch-size must be <= 8"
        assert_refused(
            lambda: client.infer("add", inputs(a=rows, b=rows)), "INVALID_ARGUMENT", text
        )
        client.load_model("add", config=json.dumps(config))
        assert client.get_model_config("add").config.max_batch_size == 16
        assert client.infer("add", inputs(a=rows, b=rows)).as_numpy("c").shape == (9, 4)
        client.load_model("add")  # as the repository says
        assert client.get_model_config("add").config.max_batch_size == 8


def check_upload_of_a_file(url: str) -> None:
    """A model that the repository does not hold."""
    content = Path(os.environ["PLUS_ONE_FILE"]).read_bytes()
    with triton.InferenceServerClient(url) as client:
        client.load_model("uploaded", config="{}", files={"file:1/model.onnx": content})
        assert client.infer("uploaded", ones()).as_numpy("c").tolist() == [[2, 2, 2, 2]]
        _unload(client, "uploaded")


def check_refused_loads(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert_refused(
            lambda: client.load_model("unheard_of"),
            "INTERNAL",
            "failed to load 'unheard_of', failed to poll from model repository",
        )
        assert_refused(
            lambda: client.load_model("add", config="{}", files={"file:../climbed": b"x"}),
            "INVALID_ARGUMENT",
        )
        assert_refused(
            lambda: client.load_model("add", files={"file:1/model.onnx": b"x"}), "INVALID_ARGUMENT"
        )


def check_a_failed_reload_leaves_the_old_serving(url: str) -> None:
    rows = np.ones((1, 4), np.float32)
    with triton.InferenceServerClient(url) as client:
        broken = {"file:1/model.onnx": b"not a model"}
        assert_refused(
            lambda: client.load_model("add", config="{}", files=broken),
            "INTERNAL",
            "failed to load 'add'",
        )
        assert client.is_model_ready("add")
        assert client.infer("add", inputs(a=rows, b=rows)).as_numpy("c").tolist() == [[2] * 4]


if __name__ == "__main__":
    main(globals())
