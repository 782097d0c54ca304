# SPDX-License-Identifier: Apache-2.0
"""What is read of a network, and what the builder is told, on TensorRT for RTX itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from thirdrail_engines.plans import Builder, PlanRequest
from thirdrail_engines.tensorrt import network as networks
from thirdrail_engines.tensorrt.api import load_api
from thirdrail_engines.tensorrt.builder import _Bench

pytestmark = pytest.mark.needs_tensorrt

FLOAT = TensorProto.FLOAT


@pytest.fixture
def parsed(write_graph: Callable[..., Path]) -> Any:
    """A network of two inputs, with what has to live as long."""
    path = write_graph(
        [
            helper.make_node("Add", ["x", "y"], ["z"]),
            helper.make_node("Reshape", ["z", "s"], ["w"]),
        ],
        {
            "x": (FLOAT, ["n", "n", 4, "m"]),
            "y": (FLOAT, ["n", 1, 1, 1]),
            "s": (TensorProto.INT64, [2]),
        },
        {"w": (FLOAT, ["a", "b"])},
    )
    trt = load_api(Builder.TENSORRT_RTX).trt
    logger = trt.Logger(trt.Logger.ERROR)
    native = trt.Builder(logger)
    network = native.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    return network, parser, native, logger


def test_what_is_read_of_a_network(parsed: Any) -> None:
    network = parsed[0]
    assert networks.same_names(network) == [("x", [0, 1], "n")]
    assert networks.shape_inputs(network) == ["s"]
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in networks.tensors_of(network)]
    assert tensors == [
        ("x", "FP32", (-1, -1, 4, -1)),
        ("y", "FP32", (-1, 1, 1, 1)),
        ("s", "INT64", (2,)),
        ("w", "FP32", (-1, -1)),
    ]
    layers = networks.layers_of(network)
    assert layers["elementwise"] >= 1
    assert list(layers.values()) == sorted(layers.values(), reverse=True)


def test_options_reach_the_builder(
    request_for: Callable[..., PlanRequest], sum_path: Path, tmp_path: Path
) -> None:
    """Some change nothing in the plans of TensorRT for RTX, so they are looked at on the way."""
    request = request_for(
        sum_path,
        compute_capabilities=("sm86", "sm120"),
        workspace_bytes=1 << 28,
        optimization_level=5,
        is_version_compatible=True,
        is_refittable=True,
        threads_max=2,
    )
    bench = _Bench(request, sum_path, tmp_path)
    native = bench._start()
    config = bench._configure(native)
    trt = load_api(Builder.TENSORRT_RTX).trt
    assert native.max_threads == 2
    assert config.builder_optimization_level == 5
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_flag(trt.BuilderFlag.REFIT)
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]


def test_what_is_left_out_stays_as_the_package_has_it(
    request_for: Callable[..., PlanRequest], sum_path: Path, tmp_path: Path
) -> None:
    bench = _Bench(request_for(sum_path), sum_path, tmp_path)
    native = bench._start()
    config, untouched = bench._configure(native), native.create_builder_config()
    assert config.flags == untouched.flags
    assert config.builder_optimization_level == untouched.builder_optimization_level
    trt = load_api(Builder.TENSORRT_RTX).trt
    pool = trt.MemoryPoolType.WORKSPACE
    assert config.get_memory_pool_limit(pool) == untouched.get_memory_pool_limit(pool)


def test_a_damaged_plan_is_recognised_by_the_package() -> None:
    api = load_api(Builder.TENSORRT_RTX)
    assert api.engine_validity(b"no plan" * 100, api.trt.Logger()) == ("MALFORMED_ENGINE",)
