# SPDX-License-Identifier: Apache-2.0
"""Who is to blame for a run that fails, whatever engine runs: part of the engines' contract."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from thirdrail import dtypes
from thirdrail_engines import Engine, EngineError, EngineInputError, EngineMemoryError

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
Node = helper.make_node

WriteModel = Callable[..., Path]
LoadModel = Callable[..., Engine]


@pytest.mark.parametrize("count", [4, 100_000], ids=["small", "large"])
def test_an_array_that_does_not_fit_is_refused_and_untouched(
    identity: Callable[..., Engine], count: int
) -> None:
    engine = identity()
    x = np.ones(count, np.float32)
    read_only = np.zeros(count, np.float32)
    read_only.flags.writeable = False
    for target in (
        np.zeros(count - 1, np.float32),
        np.zeros((count, 1), np.float32),
        np.zeros(count, np.float64),
        np.zeros(count, np.int32),
        np.zeros(2 * count, np.float32)[::2],
        read_only,
    ):
        with pytest.raises(EngineError, match=r"\by\b") as caught:
            engine.run({"x": x}, ["y"], {"y": target})
        assert not isinstance(caught.value, EngineInputError)
        assert not target.any()


def test_a_failing_run_says_why_and_the_next_succeeds(
    write_model: WriteModel, load_model: LoadModel
) -> None:
    engine = load_model(
        write_model(
            [Node("Gather", ["x", "index"], ["y"], name="pick")],
            {"x": (FLOAT, ["n"]), "index": (INT64, ["k"])},
            {"y": (FLOAT, ["k"])},
        )
    )
    x = np.arange(3, dtype=np.float32)
    with pytest.raises(EngineInputError) as caught:
        engine.run({"x": x, "index": np.array([7])}, ["y"], {})
    assert str(caught.value) == (
        "the model cannot compute with 'x' [3], 'index' [1]: Gather node 'pick': indices element "
        "out of data bounds, idx=7 must be within the inclusive range [-3,2]"
    )
    assert engine.run({"x": x, "index": np.array([2])}, ["y"], {})["y"].tolist() == [2]


@pytest.mark.parametrize(
    ("node", "inputs", "reason"),
    [
        (
            Node("Add", ["a", "b"], ["y"]),
            {"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)},
            ("'a' [3], 'b' [4]: Add node: ", " 3 by 4"),  # in a run that is bound, once it is large
        ),
        (
            Node("Reshape", ["a", "b"], ["y"]),
            {"a": np.zeros(3, np.float32), "b": np.array([2, 2])},
            ("'a' [3], 'b' [2]: Reshape node: ", "requested shape:{2,2}"),
        ),
        (
            Node("Cast", ["a"], ["y"], to=FLOAT),
            {"a": dtypes.object_array([b"1", b"one"], (2,))},
            ("'a' [2]: Cast node: ", ": a text is no number, or one out of range"),
        ),
    ],
    ids=["Add", "Reshape", "Cast"],
)
@pytest.mark.parametrize("is_bound", [False, True])
def test_what_a_kernel_refuses_is_the_fault_of_the_inputs(
    write_model: WriteModel,
    load_model: LoadModel,
    node: Any,
    inputs: dict[str, Any],
    reason: tuple[str, str],
    is_bound: bool,
) -> None:
    types = {"f": FLOAT, "i": INT64, "O": STRING}
    values = {name: (types[a.dtype.kind], ["n"] * a.ndim) for name, a in inputs.items()}
    engine = load_model(write_model([node], values, {"y": (FLOAT, None)}))
    into = {"y": np.zeros(1 << 16, np.float32)} if is_bound else {}
    with pytest.raises(EngineInputError) as caught:
        engine.run(inputs, ["y"], into)
    start, end = reason
    assert str(caught.value).startswith(f"the model cannot compute with {start}")
    assert str(caught.value).endswith(end)


def test_no_memory_is_nobodys_fault(write_model: WriteModel, load_model: LoadModel) -> None:
    engine = load_model(
        write_model(
            [Node("Expand", ["x", "shape"], ["y"])],
            {"x": (FLOAT, ["n"]), "shape": (INT64, ["rank"])},
            {"y": (FLOAT, None)},
        )
    )
    inputs = {"x": np.zeros(1, np.float32), "shape": np.array([1 << 50])}  # no address space has it
    with pytest.raises(EngineMemoryError, match=r"^no memory for a run with 'x' \[1\], 'shape' "):
        engine.run(inputs, ["y"], {})


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({}, ["y"]),
        ({"x": np.ones((2, 2), np.float32)}, ["y"]),
        ({"x": np.ones(2, np.float64)}, ["y"]),
        ({"x": np.ones(2, np.float32), "other": np.ones(2, np.float32)}, ["y"]),
        ({"x": np.ones(2, np.float32)}, ["other"]),
        ({"x": np.ones(2, ml_dtypes.bfloat16)}, ["y"]),
    ],
    ids=["absent", "rank", "type", "unknown input", "unknown output", "BF16"],
)
def test_what_does_not_fit_the_model_is_an_engine_error(
    identity: Callable[..., Engine], inputs: dict[str, Any], wanted: list[str]
) -> None:
    with pytest.raises(EngineError) as caught:
        identity().run(inputs, wanted, {})
    assert type(caught.value) is EngineError  # whoever runs an engine knows its spec
