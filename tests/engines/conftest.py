# SPDX-License-Identifier: Apache-2.0
"""Models made for the purpose, and the engines that run them."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines import Engine, EngineOptions, Inspector
from thirdrail_engines.builders import onnxruntime_builder
from thirdrail_engines.onnxruntime_engine import load_onnx, load_plan
from thirdrail_engines.plans import Builder, PlanRequest

# Name -> ONNX element type and dimensions; None as dimensions: the rank is left out.
Values = Mapping[str, tuple[int, Sequence[int | str] | None]]
WriteModel = Callable[..., Path]
LoadModel = Callable[..., Engine]


def build_model(
    nodes: Sequence[Any],
    inputs: Values,
    outputs: Values,
    constants: Mapping[str, npt.NDArray[Any]] | None = None,
    functions: Sequence[Any] = (),
) -> Any:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("own", 1)],
        functions=functions,
        ir_version=10,
    )


@pytest.fixture(name="build_model")
def build_model_fixture() -> Callable[..., Any]:
    """The ModelProto of a graph: build_model(nodes, inputs, outputs, constants)."""
    return build_model


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """The same as a file: write_model(nodes, inputs, outputs, constants) -> its path."""

    def write(*graph: Any, **more: Any) -> Path:
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save(build_model(*graph, **more), path)
        return path

    return write


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    with Inspector() as shared:
        yield shared


@pytest.fixture(params=["onnxruntime", "onnxruntime_plan"])
def load_model(request: pytest.FixtureRequest, inspector: Inspector) -> Iterator[LoadModel]:
    """Load a file on the engine under test, for the length of the test."""
    engines: list[Engine] = []

    def load_one(path: Path, threads_max: int = 1) -> Engine:
        options = EngineOptions(threads_max=threads_max)
        if request.param == "onnxruntime_plan":
            engines.append(load_plan(plan_of(path), path, options=options))
        else:
            engines.append(load_onnx(path, options=options, inspector=inspector))
        return engines[-1]

    yield load_one
    for engine in engines:
        engine.close()


def plan_of(path: Path) -> bytes:
    """The plan of a model; made in this process, which is a matter of milliseconds."""
    request = PlanRequest(path, Builder.ONNXRUNTIME, "")
    with tempfile.TemporaryDirectory() as folder:
        built = onnxruntime_builder.build(request, path, Path(folder), lambda *_: None)
        return built.plan.read_bytes()


@pytest.fixture
def identity(write_model: WriteModel, load_model: LoadModel) -> Callable[..., Engine]:
    """An engine whose output y is its input x: identity(element type, dimensions)."""

    def make(element_type: int = TensorProto.FLOAT, dims: Sequence[int | str] = ("n",)) -> Engine:
        value = (element_type, dims)
        node = helper.make_node("Identity", ["x"], ["y"])
        return load_model(write_model([node], {"x": value}, {"y": value}))

    return make


@pytest.fixture
def waiting_for_x(write_model: WriteModel, load_model: LoadModel) -> Engine:
    """Counts rounds until x[0] >= 1, at most 3 million: y holds the count in each element.

    A run that ends earlier read the caller's own memory while the caller was able to write there.
    """
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Add", ["count", "one_whole"], ["next"]),
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Less", ["largest", "one"], ["again"]),
        ],
        "round",
        [
            scalar("round", TensorProto.INT64, []),
            scalar("go_on", TensorProto.BOOL, []),
            scalar("count", TensorProto.INT64, []),
        ],
        [scalar("again", TensorProto.BOOL, []), scalar("next", TensorProto.INT64, [])],
    )
    nodes = [
        helper.make_node("Loop", ["rounds_max", "", "zero"], ["rounds"], body=body),
        helper.make_node("Cast", ["rounds"], ["rounds_float"], to=TensorProto.FLOAT),
        helper.make_node("Expand", ["rounds_float", "y_shape"], ["y"]),
    ]
    return load_model(
        write_model(
            nodes,
            {"x": (TensorProto.FLOAT, [1])},
            {"y": (TensorProto.FLOAT, [1 << 16])},
            {
                "rounds_max": np.array(3_000_000),
                "zero": np.array(0),
                "one_whole": np.array(1),
                "one": np.array(1, np.float32),
                "y_shape": np.array([1 << 16]),
            },
        )
    )
