# SPDX-License-Identifier: Apache-2.0
"""tritonclient, one call after the other: descriptions, tensors of every type, options."""

from typing import Any

import ml_dtypes
import numpy as np
import tritonclient.grpc as triton

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import executions, inputs, ones

MIB = 1 << 20

VALUES: dict[str, Any] = {
    "bool": np.array([True, False, True]),
    "uint8": np.array([0, 7, 255], np.uint8),
    "uint16": np.array([0, 7, 65535], np.uint16),
    "uint32": np.array([0, 7, 2**32 - 1], np.uint32),
    "uint64": np.array([0, 7, 2**64 - 1], np.uint64),
    "int8": np.array([-128, 0, 127], np.int8),
    "int16": np.array([-(2**15), 0, 2**15 - 1], np.int16),
    "int32": np.array([-(2**31), 0, 2**31 - 1], np.int32),
    "int64": np.array([-(2**63), 0, 2**63 - 1], np.int64),
    "fp16": np.array([-0.0, 1.5, np.inf], np.float16),
    "bf16": np.array([-1.0, 3.140625, 1e38], ml_dtypes.bfloat16),
    "fp32": np.array([-0.0, 1e-45, 3.4e38], np.float32),
    "fp64": np.array([-0.0, 5e-324, 1.7e308], np.float64),
    "bytes": np.array([b"", b"a\0b", "Stra\u00dfe".encode(), b"x" * 70_000], np.object_),
}


def check_server_is_live_and_ready(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("plus_one")
        assert client.is_model_ready("plus_one", "1")
        assert not client.is_model_ready("unheard_of")


def check_descriptions(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        server = client.get_server_metadata(as_json=True)
        assert server["name"], server
        assert "statistics" in server["extensions"], server
        metadata = client.get_model_metadata("add")
        assert list(metadata.versions) == ["1"]
        signature = [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs]
        assert signature == [("a", "FP32", [-1, 4]), ("b", "FP32", [-1, 4])], signature
        config = client.get_model_config("add").config
        assert (config.name, config.max_batch_size) == ("add", 8)
        assert [list(each.dims) for each in config.input] == [[4], [4]]
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert client.get_model_config("add", as_json=True)["config"]["name"] == "add"


def check_repository_index(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        index = {each.name: each for each in client.get_model_repository_index().models}
        assert index["add"].state == "READY"
        assert index["add"].version == "1"


def check_every_data_type_comes_back(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        for name, array in VALUES.items():
            result = client.infer(f"identity_{name}", inputs(x=array))
            back = result.as_numpy("y")
            assert back.dtype == array.dtype, (name, back.dtype)
            assert back.tobytes() == array.tobytes() or list(back) == list(array), name
            assert result.get_output("y").datatype == name.upper()


def check_an_empty_tensor_comes_back(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        result = client.infer("identity_fp32", inputs(x=np.zeros(0, np.float32)))
        assert result.as_numpy("y").shape == (0,)


def check_a_large_message_comes_back(url: str) -> None:
    array = np.arange(4 * MIB, dtype=np.float32)  # above gRPC's own limit of 4 MiB
    with triton.InferenceServerClient(url) as client:
        back = client.infer("identity_fp32", inputs(x=array)).as_numpy("y")
        assert np.array_equal(back, array)


def check_batched_model(url: str) -> None:
    a, b = np.arange(8, dtype=np.float32).reshape(2, 4), np.ones((2, 4), np.float32)
    with triton.InferenceServerClient(url) as client:
        assert np.array_equal(client.infer("add", inputs(a=a, b=b)).as_numpy("c"), a + b)


def check_what_a_reply_names(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        result = client.infer(
            "plus_one",
            ones(),
            model_version="1",
            outputs=[triton.InferRequestedOutput("c")],
            request_id="order 7",
            priority=1,
            timeout=5_000_000,
            parameters={"text": "a", "number": 3, "fraction": 0.5, "flag": True},
            headers={"x-caller": "test"},
        )
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == (
            "order 7",
            "plus_one",
            "1",
        )
        assert result.as_numpy("unheard_of") is None


def check_classification(url: str) -> None:
    scores = np.array([[0.1, 0.7, 0.2], [9, 8, 7]], np.float32)
    wanted = [triton.InferRequestedOutput("scores", class_count=2)]
    with triton.InferenceServerClient(url) as client:
        classes = client.infer("classifier", inputs(x=scores), outputs=wanted).as_numpy("scores")
        expected = [
            [b"0.700000:1:dog", b"0.200000:2:fish"],
            [b"9.000000:0:cat", b"8.000000:1:dog"],
        ]
        assert classes.tolist() == expected, classes


def check_compressed_requests(url: str) -> None:
    array = np.zeros(100_000, np.float32)
    with triton.InferenceServerClient(url) as client:
        for algorithm in ("gzip", "deflate"):
            result = client.infer("identity_fp32", inputs(x=array), compression_algorithm=algorithm)
            assert np.array_equal(result.as_numpy("y"), array), algorithm


def check_statistics_rise(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        executions(client, "add")  # until those before are counted
        before = client.get_inference_statistics("add").model_stats[0]
        rows = np.ones((3, 4), np.float32)
        client.infer("add", inputs(a=rows, b=rows))
        executions(client, "add")
        after = client.get_inference_statistics("add", "1").model_stats[0]
        assert after.inference_count - before.inference_count == 3
        assert after.execution_count - before.execution_count == 1
        stages = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        for stage in stages:
            old, new = (getattr(each.inference_stats, stage) for each in (before, after))
            assert new.count - old.count == 1, stage
            assert new.ns >= old.ns, stage
        assert after.last_inference > 0
        everything = {each.name for each in client.get_inference_statistics().model_stats}
        assert {"add", "plus_one", "slow"} <= everything


def check_trace_and_log_settings(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert list(client.get_trace_settings().settings["trace_level"].value) == ["OFF"]
        client.update_trace_settings("plus_one", {"trace_rate": "5"})
        assert list(client.get_trace_settings("plus_one").settings["trace_rate"].value) == ["5"]
        client.update_trace_settings("plus_one", {"trace_rate": None})
        assert client.get_log_settings().settings["log_info"].bool_param


def check_shared_memory_is_empty(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert not client.get_system_shared_memory_status().regions
        assert not client.get_cuda_shared_memory_status().regions


if __name__ == "__main__":
    main(globals())
