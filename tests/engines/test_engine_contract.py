# SPDX-License-Identifier: Apache-2.0
"""What every engine does, whatever runs behind it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from thirdrail import dtypes
from thirdrail_engines import Engine, EngineInputError

FLOAT, INT64, BOOL, STRING = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)
ELEMENT_TYPES = {
    "BOOL": BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": STRING,
}
NUMERIC = sorted(set(ELEMENT_TYPES) - {"BYTES"})
Node = helper.make_node

WriteModel = Callable[..., Path]
LoadModel = Callable[..., Engine]


def sample(name: str, count: int = 5) -> Any:
    dtype = dtypes.BY_NAME[name]
    if name == "BYTES":
        return dtypes.object_array([b"row %d" % i for i in range(count)], (count,))
    return (np.arange(count) % 100).astype(dtype.numpy)


@pytest.mark.parametrize("name", sorted(ELEMENT_TYPES))
def test_every_type_passes_unchanged(identity: Callable[..., Engine], name: str) -> None:
    engine = identity(ELEMENT_TYPES[name])
    x = sample(name)
    assert engine.spec.inputs[0].dtype.name == engine.spec.outputs[0].dtype.name == name
    y = engine.run({"x": x}, ["y"], {})["y"]
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()
    if name != "BYTES":
        assert not np.shares_memory(x, y)


@pytest.mark.parametrize("name", NUMERIC)
def test_large_results_of_every_numeric_type_are_written_into_the_callers_array(
    identity: Callable[..., Engine], name: str
) -> None:
    engine = identity(ELEMENT_TYPES[name])
    x = sample(name, 200_000)
    target = np.zeros_like(x)
    assert engine.run({"x": x}, ["y"], {"y": target})["y"] is target
    assert target.tolist() == x.tolist()


@pytest.mark.parametrize("name", NUMERIC)
def test_small_results_come_in_the_callers_array_or_another(
    identity: Callable[..., Engine], name: str
) -> None:
    engine = identity(ELEMENT_TYPES[name])
    x = sample(name)
    target = np.zeros_like(x)
    y = engine.run({"x": x}, ["y"], {"y": target})["y"]
    assert y.tolist() == x.tolist()
    assert y is target or not np.shares_memory(y, target)


@pytest.mark.parametrize("name", ["FP32", "BF16", "BYTES"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 4)], ids=str)
def test_scalars_and_empty_tensors(
    identity: Callable[..., Engine], name: str, shape: tuple[int, ...]
) -> None:
    engine = identity(ELEMENT_TYPES[name], [f"d{i}" for i in range(len(shape))])
    x = sample(name, int(np.prod(shape))).reshape(shape)
    y = engine.run({"x": x}, ["y"], {})["y"]
    assert (y.shape, y.tolist()) == (shape, x.tolist())
    if name != "BYTES":
        again = engine.run({"x": x}, ["y"], {"y": np.zeros_like(x)})["y"]
        assert (again.shape, again.tolist()) == (shape, x.tolist())


def test_read_only_inputs_are_accepted(identity: Callable[..., Engine]) -> None:
    x = np.frombuffer(np.arange(50_000, dtype=np.float32).tobytes(), np.float32)
    target = np.zeros(x.shape, np.float32)
    engine = identity()
    assert engine.run({"x": x}, ["y"], {})["y"].tolist() == x.tolist()
    assert engine.run({"x": x}, ["y"], {"y": target})["y"].tolist() == x.tolist()


def test_open_dimensions_are_minus_one(write_model: WriteModel, load_model: LoadModel) -> None:
    path = write_model(
        [Node("MatMul", ["x", "w"], ["y"]), Node("Reshape", ["x", "shape"], ["z"])],
        {"x": (FLOAT, ["batch", 3]), "shape": (INT64, ["rank"])},
        {"y": (FLOAT, ["batch", 2]), "z": (FLOAT, None)},
        {"w": np.ones((3, 2), np.float32)},
    )
    spec = load_model(path).spec
    assert [(t.name, t.shape) for t in spec.inputs] == [("x", (-1, 3)), ("shape", (-1,))]
    assert [(t.name, t.shape) for t in spec.outputs] == [("y", (-1, 2)), ("z", ())]
    assert spec.unranked == {"z"}
    assert spec.positional_inputs == {"x"}


def test_only_wanted_outputs_come_back(write_model: WriteModel, load_model: LoadModel) -> None:
    engine = load_model(
        write_model(
            [Node("Neg", ["x"], ["minus"]), Node("Add", ["x", "x"], ["twice"])],
            {"x": (FLOAT, ["n"])},
            {"minus": (FLOAT, ["n"]), "twice": (FLOAT, ["n"])},
        )
    )
    x = np.ones(3, np.float32)
    assert {k: v.tolist() for k, v in engine.run({"x": x}, ["twice"], {}).items()} == {
        "twice": [2, 2, 2]
    }
    assert engine.run({"x": x}, [], {}) == {}
    mixed = engine.run({"x": x}, ["twice", "minus"], {"minus": x.copy()})
    assert {k: v.tolist() for k, v in mixed.items()} == {
        "twice": [2, 2, 2],
        "minus": [-1, -1, -1],
    }


def test_an_input_with_a_default_may_be_absent(
    write_model: WriteModel, load_model: LoadModel
) -> None:
    engine = load_model(
        write_model(
            [Node("Mul", ["x", "factor"], ["y"])],
            {"x": (FLOAT, ["n"]), "factor": (FLOAT, [1])},
            {"y": (FLOAT, ["n"])},
            {"factor": np.array([3], np.float32)},
        )
    )
    assert {t.name: t.optional for t in engine.spec.inputs} == {"x": False, "factor": True}
    assert engine.spec.positional_inputs == {"x"}
    assert engine.spec.sized_by_shapes
    x = np.ones(2, np.float32)
    assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [3, 3]
    five = np.array([5], np.float32)
    assert engine.run({"x": x, "factor": five}, ["y"], {})["y"].tolist() == [5, 5]


def test_text_goes_in_and_out_beside_numbers(
    write_model: WriteModel, load_model: LoadModel
) -> None:
    engine = load_model(
        write_model(
            [
                Node("StringConcat", ["words", "words"], ["twice"]),
                Node("Neg", ["x"], ["minus"]),
                Node("Cast", ["x"], ["digits"], to=STRING),
            ],
            {"words": (STRING, ["n"]), "x": (FLOAT, ["n"])},
            {"twice": (STRING, ["n"]), "minus": (FLOAT, ["n"]), "digits": (STRING, ["n"])},
        )
    )
    words = dtypes.object_array(["né".encode(), b"", b"a\0b"], (3,))
    x = np.full(3, 2, np.float32)
    target = np.zeros(3, np.float32)
    wanted = ["twice", "minus", "digits"]
    answer = engine.run({"words": words, "x": x}, wanted, {"minus": target})
    assert answer["twice"].tolist() == ["néné".encode(), b"", b"a\0ba\0b"]
    assert answer["digits"].tolist() == [b"2", b"2", b"2"]
    assert answer["minus"].tolist() == [-2, -2, -2]
    with pytest.raises(EngineInputError, match="'words' has an element that is not UTF-8"):
        engine.run({"words": dtypes.object_array([b"\xff"], (1,)), "x": x[:1]}, wanted, {})


def test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing(
    write_model: WriteModel, load_model: LoadModel
) -> None:
    engine = load_model(
        write_model(
            [Node("Compress", ["x", "keep"], ["y"], axis=0)],
            {"x": (FLOAT, ["n"]), "keep": (BOOL, ["n"])},
            {"y": (FLOAT, ["k"])},
        )
    )
    keep = np.array([0, 1, 255, 2], np.uint8).view(np.bool_)
    x = np.arange(4, dtype=np.float32)
    assert engine.run({"x": x, "keep": keep}, ["y"], {})["y"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [3, 100_000], ids=["small", "large"])
def test_results_never_share_memory_with_inputs(
    write_model: WriteModel, load_model: LoadModel, count: int
) -> None:
    engine = load_model(
        write_model(
            [
                Node("Identity", ["x"], ["same"]),
                Node("Reshape", ["x", "shape"], ["shaped"]),
                Node("Unsqueeze", ["x", "axis"], ["taller"]),
                Node("Add", ["x", "zero"], ["added"]),
                Node("Cast", ["x"], ["cast"], to=FLOAT),
                Node("Slice", ["x", "axis", "end"], ["sliced"]),
            ],
            {"x": (FLOAT, ["n"])},
            dict.fromkeys(
                ("x", "same", "shaped", "taller", "added", "cast", "sliced"), (FLOAT, None)
            ),
            {
                "shape": np.array([-1]),
                "axis": np.array([0]),
                "zero": np.array(0, np.float32),
                "end": np.array([np.iinfo(np.int64).max]),
            },
        )
    )
    x = np.arange(count, dtype=np.float32)
    names = [tensor.name for tensor in engine.spec.outputs]
    targets = {name: np.zeros(count, np.float32) for name in names if name not in ("taller",)}
    targets["taller"] = np.zeros((1, count), np.float32)
    for into in ({}, targets, {"same": targets["same"]}):
        results = engine.run({"x": x}, names, into)
        for name, result in results.items():
            assert result.ravel().tolist() == x.tolist(), name
            assert not np.shares_memory(result, x), name


def test_a_constant_result_is_not_the_weights(
    write_model: WriteModel, load_model: LoadModel
) -> None:
    engine = load_model(
        write_model(
            [Node("Identity", ["x"], ["y"]), Node("Add", ["w", "w"], ["folded"])],
            {"x": (FLOAT, ["n"])},
            {"y": (FLOAT, ["n"]), "w": (FLOAT, [2]), "folded": (FLOAT, [2])},
            {"w": np.array([1, 2], np.float32)},
        )
    )
    x = np.zeros(1, np.float32)
    for _ in range(2):
        answer = engine.run({"x": x}, ["w", "folded"], {})
        assert answer["w"].tolist() == [1, 2]
        assert answer["folded"].tolist() == [2, 4]
        answer["w"][:] = answer["folded"][:] = 9


@pytest.mark.parametrize("name", ["FP32", "BF16"])
def test_results_outlive_the_engine(identity: Callable[..., Engine], name: str) -> None:
    engine = identity(ELEMENT_TYPES[name])
    x = sample(name, 100_000)
    y = engine.run({"x": x}, ["y"], {})["y"]
    engine.run({"x": np.zeros_like(x)}, ["y"], {})
    engine.close()
    assert y.tolist() == x.tolist()


def test_eight_threads_share_one_engine(write_model: WriteModel, load_model: LoadModel) -> None:
    engine = load_model(
        write_model(
            [Node("Mul", ["x", "two"], ["y"])],
            {"x": (FLOAT, ["n"])},
            {"y": (FLOAT, ["n"])},
            {"two": np.array(2, np.float32)},
        ),
        threads_max=2,
    )

    def caller(number: int) -> None:
        for count in (10, 50_000) * 20:
            x = np.full(count + number, number, np.float32)
            target = np.zeros_like(x)
            into = {"y": target} if number % 2 else {}
            y = engine.run({"x": x}, ["y"], into)["y"]
            assert y.shape == x.shape
            assert (y == 2 * number).all()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(caller, number) for number in range(8)]:
            done.result()
