# SPDX-License-Identifier: Apache-2.0
"""Batching is derived only for models whose rows do not meet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from thirdrail import dtypes
from thirdrail.tensors import TensorSpec
from thirdrail_engines import Engine, prove_batching, seeded_inputs

FLOAT, INT64, STRING, BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.STRING,
    TensorProto.BOOL,
)
Node = helper.make_node
ROWS = (FLOAT, ["batch", "n"])
ONE = np.array([1], np.int64)
WEIGHTS = np.random.default_rng(1).standard_normal((8, 4), np.float32)

AGREEING: dict[str, tuple[Any, ...]] = {
    "matrix": (
        [Node("MatMul", ["x", "w"], ["y"])],
        {"x": (FLOAT, ["batch", 8])},
        {"y": (FLOAT, ["batch", 4])},
        {"w": WEIGHTS},
    ),
    "open dimensions": ([Node("Softmax", ["x"], ["y"], axis=-1)], {"x": ROWS}, {"y": ROWS}),
    "half precision": (
        [Node("ReduceSum", ["x", "one"], ["y"], keepdims=0)],
        {"x": (TensorProto.FLOAT16, ["batch", 500])},
        {"y": (TensorProto.FLOAT16, ["batch"])},
        {"one": ONE},
    ),
    "text": (
        [Node("StringConcat", ["a", "a"], ["y"])],
        {"a": (STRING, ["batch", 2])},
        {"y": (STRING, ["batch", 2])},
    ),
    "text with numbers in it": (
        [Node("Cast", ["a"], ["y"], to=FLOAT)],
        {"a": (STRING, ["batch"])},
        {"y": (FLOAT, ["batch"])},
    ),
    "indices of a small table": (
        [Node("Gather", ["w", "i"], ["y"])],
        {"i": (INT64, ["batch", "n"])},
        {"y": (FLOAT, ["batch", "n", 4])},
        {"w": WEIGHTS},
    ),
    "booleans": (
        [Node("Not", ["b"], ["y"])],
        {"b": (BOOL, ["batch", 9])},
        {"y": (BOOL, ["batch", 9])},
    ),
    "only small sizes fit": (
        [Node("Expand", ["x", "shape"], ["y"])],  # 32 and 64 do not go into 8
        {"x": ROWS},
        {"y": (FLOAT, ["batch", 8])},
        {"shape": np.array([1, 8])},
    ),
}

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "rows meet": (
        "output 'y' differs in row 0 between a batch and a single run",
        (
            [Node("ReduceMean", ["x", "zero"], ["m"]), Node("Add", ["x", "m"], ["y"])],
            {"x": ROWS},
            {"y": ROWS},
            {"zero": np.array([0])},
        ),
    ),
    "a row sees those before it": (
        "output 'y' differs in row 1",
        ([Node("CumSum", ["x", "axis"], ["y"])], {"x": ROWS}, {"y": ROWS}, {"axis": np.array(0)}),
    ),
    "one output is fine and one is not": (
        "output 'z' has the shape [1, 32] for 4 rows and [1, 32] for one",
        (
            [Node("Neg", ["x"], ["y"]), Node("Slice", ["x", "zero", "one"], ["z"])],
            {"x": ROWS},
            {"y": ROWS, "z": (FLOAT, ["any", "n"])},
            {"zero": np.array([0]), "one": ONE},
        ),
    ),
    "rows are reordered": (
        "output 'y' differs",
        (
            [Node("Slice", ["x", "last", "first", "zero", "back"], ["y"])],
            {"x": ROWS},
            {"y": ROWS},
            {
                "last": np.array([-1]),
                "first": np.array([np.iinfo(np.int64).min]),
                "zero": np.array([0]),
                "back": np.array([-1]),
            },
        ),
    ),
    "the batch is the second axis": (
        "'x' has the shape [2, -1]: no open first dimension",
        ([Node("Neg", ["x"], ["y"])], {"x": (FLOAT, [2, "n"])}, {"y": (FLOAT, [2, "n"])}),
    ),
    "an output without the batch": (
        "'y' has the shape []: no open first dimension",
        (
            [Node("ReduceSum", ["x"], ["y"], keepdims=0)],
            {"x": ROWS},
            {"y": (FLOAT, [])},
        ),
    ),
    "an input of unknown rank": (
        "the rank of 'x' is not known",
        ([Node("Neg", ["x"], ["y"])], {"x": (FLOAT, None)}, {"y": (FLOAT, None)}),
    ),
    "nothing to learn": (
        "the trial rows prove nothing: all have the same result",
        (
            [Node("Mul", ["x", "zero"], ["p"]), Node("Abs", ["p"], ["y"])],
            {"x": ROWS},
            {"y": ROWS},
            {"zero": np.array(0, np.float32)},
        ),
    ),
    "rows that meet where no result is a number": (
        "the trial rows prove nothing: all have the same result",
        (
            [
                Node("ReduceMean", ["x", "axis"], ["mean"]),
                Node("Abs", ["x"], ["size"]),
                Node("Neg", ["size"], ["negative"]),
                Node("Log", ["negative"], ["none"]),
                Node("Add", ["none", "mean"], ["y"]),
            ],
            {"x": ROWS},
            {"y": ROWS},
            {"axis": np.array([0])},
        ),
    ),
    "rows that meet and differ by less than is forgiven": (
        "the trial rows prove nothing: all have the same result",
        (
            [
                Node("ReduceMean", ["x", "axis"], ["mean"]),
                Node("Add", ["x", "mean"], ["sum"]),
                Node("Add", ["sum", "far"], ["y"]),
            ],
            {"x": ROWS},
            {"y": ROWS},
            {"axis": np.array([0]), "far": np.array(1e5, np.float32)},
        ),
    ),
    "no size works": (
        "no trial input was accepted: the model cannot compute with 'x' [1, 32]: MatMul node",
        (
            [Node("MatMul", ["x", "w"], ["y"])],
            {"x": ROWS},
            {"y": (FLOAT, ["batch", 4])},
            {"w": np.ones((13, 4), np.float32)},
        ),
    ),
    "only single rows work": (
        "a batch of 4 rows fails: the model cannot compute with 'x' [4, 6]: Add node",
        (
            [
                Node("Shape", ["x"], ["rows"], end=1),
                Node("Mul", ["rows", "rows"], ["squared"]),
                Node("Concat", ["squared", "six"], ["shape"], axis=0),
                Node("ConstantOfShape", ["shape"], ["zeros"]),
                Node("Add", ["x", "zeros"], ["y"]),
            ],
            {"x": (FLOAT, ["batch", 6])},
            {"y": (FLOAT, ["batch", 6])},
            {"six": np.array([6])},
        ),
    ),
    "too much to try": (
        "a trial would take more than",
        (
            [Node("Neg", ["x"], ["y"])],
            {"x": (FLOAT, ["batch", 1 << 14, 1 << 14])},
            {"y": (FLOAT, ["batch", 1 << 14, 1 << 14])},
        ),
    ),
}


@pytest.fixture
def engine_of(
    write_model: Callable[..., Path], load_model: Callable[[Path], Engine]
) -> Callable[..., Engine]:
    return lambda graph: load_model(write_model(*graph))


@pytest.mark.parametrize("name", sorted(AGREEING))
def test_rows_that_agree(engine_of: Callable[..., Engine], name: str) -> None:
    proof = prove_batching(engine_of(AGREEING[name]), 4)
    assert (proof.agreed, proof.reason) == (True, "")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_rows_that_do_not(engine_of: Callable[..., Engine], name: str) -> None:
    expected, graph = REFUSED[name]
    proof = prove_batching(engine_of(graph), 4)
    assert not proof.agreed
    assert proof.reason.startswith(expected)


def test_seeded_inputs_are_the_same_each_time_and_differ_by_row() -> None:
    specs = [
        TensorSpec(row.name, row, (-1, 3, -1), False)
        for row in dtypes.DTYPES
        if row.numpy is not None
    ]
    first, again = (seeded_inputs(specs, 2, size=8, whole_max=50) for _ in range(2))
    other = seeded_inputs(specs, 2, size=8, whole_max=50, seed=1)
    assert first is not None
    assert again is not None
    assert other is not None
    for spec in specs:
        array = first[spec.name]
        assert array.shape == (2, 3, 8)
        assert array.dtype == spec.dtype.numpy
        assert array.tolist() == again[spec.name].tolist()
        assert array.tolist() != other[spec.name].tolist()
        assert array[0].tolist() != array[1].tolist()


def test_without_rows_the_first_dimension_is_like_the_others() -> None:
    spec = TensorSpec("x", dtypes.BY_NAME["FP32"], (-1, 3), False)
    inputs = seeded_inputs([spec], None, size=5)
    assert inputs is not None
    assert inputs["x"].shape == (5, 3)
