# SPDX-License-Identifier: Apache-2.0
"""Graphs to convert."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines.plans import BuildError, BuildFault, Precision
from thirdrail_engines.precision import convert

FLOAT, HALF, BFLOAT, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
)
FP16, BF16 = Precision.FP16, Precision.BF16
BOTH = pytest.mark.parametrize("precision", [FP16, BF16], ids=str)
Node = helper.make_node
ROWS = (FLOAT, ["n", 8])
WEIGHTS = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)

Values = Mapping[str, tuple[int, Sequence[int | str]]]
WriteModel = Callable[..., Path]


def ignore(*_: Any) -> None:
    pass


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """write_model(nodes, inputs, outputs, constants) -> the path of the ONNX file."""

    def write(
        nodes: Sequence[Any],
        inputs: Values,
        outputs: Values,
        constants: Mapping[str, Any] | None = None,
        opset: int = 17,
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        )
        opsets = [helper.make_opsetid("", opset)]
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx"
        )
        return tmp_path / "m.onnx"

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def refused(folder: Path) -> Callable[..., str]:
    """Why a graph was not converted."""

    def fail(path: Path, precision: Precision = FP16) -> str:
        with pytest.raises(BuildError) as caught:
            convert(path, precision, folder, ignore)
        assert caught.value.fault is BuildFault.REFUSED
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return fail


def perceptron(write_model: WriteModel, opset: int = 17) -> Path:
    nodes = [
        Node("MatMul", ["x", "w"], ["h"]),
        Node("Add", ["h", "b"], ["a"]),
        Node("Tanh", ["a"], ["y"]),
    ]
    constants = {"w": WEIGHTS, "b": np.full(8, 1 / 3, np.float32)}
    return write_model(nodes, {"x": ROWS}, {"y": ROWS}, constants, opset)


def type_of(graph: Any, name: str) -> int:
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return int(types[name])


def large_inside(factor: float) -> tuple[Any, ...]:
    """x, made larger by `factor` on the way to a result that is as small again, in three steps."""
    nodes = [
        Node("Mul", ["x", "factor"], ["large"]),
        Node("Neg", ["large"], ["larger"]),
        Node("Div", ["larger", "factor"], ["small"]),
        Node("Neg", ["small"], ["y"]),
    ]
    return nodes, {"x": ROWS}, {"y": ROWS}, {"factor": np.array(factor, np.float32)}
