# SPDX-License-Identifier: Apache-2.0
"""What a reference expects goes through a file, and what is no such file is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from thirdrail.dtypes import BY_NAME, DTYPES, object_array
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.expectation_file import (
    NoExpectations,
    read_expectations,
    write_expectations,
)
from thirdrail_engines.expectations import Expectation, Skipped

BYTES_MAX = 1 << 20


def spec_of(dtype: str = "FP32", shape: tuple[int, ...] = (-1,)) -> EngineSpec:
    inputs = TensorSpec("x", BY_NAME[dtype], shape), TensorSpec("o", BY_NAME[dtype], shape, True)
    return EngineSpec(inputs, (TensorSpec("y", BY_NAME[dtype], shape),), "", frozenset())


def through(
    path: Path, spec: EngineSpec, runs: Sequence[Expectation | Skipped], bytes_max: int = BYTES_MAX
) -> tuple[EngineSpec, list[Expectation | Skipped]]:
    path.unlink(missing_ok=True)
    write_expectations(path, spec, runs, bytes_max)
    with path.open("rb") as file:
        read, came = read_expectations(file)
        return read, list(came)


def sample(dtype: str, shape: tuple[int, ...]) -> Array:
    count = int(np.prod(shape))
    if dtype == "BYTES":
        return object_array([b"\0" * n for n in range(count)], shape)
    return np.arange(count).astype(BY_NAME[dtype].numpy).reshape(shape)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
def test_every_type_arrives(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    spec, array = spec_of(dtype, shape), sample(dtype, shape)
    read, (run,) = through(tmp_path / "e", spec, [Expectation("one", {"x": array}, {"y": array})])
    assert (read.inputs, read.outputs) == (spec.inputs, spec.outputs)
    assert isinstance(run, Expectation)
    assert run.run == "one"
    for came in (run.inputs["x"], run.outputs["y"]):
        assert (came.dtype, came.shape) == (array.dtype, array.shape)
        assert came.tolist() == array.tolist()
        assert came.flags.writeable


def test_runs_keep_their_order_and_what_has_no_room_says_so(tmp_path: Path) -> None:
    large, small = np.ones(300, np.float32), np.ones(1, np.float32)
    runs: list[Expectation | Skipped] = [
        Expectation("large", {"x": small}, {"y": large}),
        Skipped("none: it \x1b[2Jwas refused"),
        Expectation("small", {"x": small, "o": small}, {"y": small}),
    ]
    _, came = through(tmp_path / "e", spec_of(), runs, bytes_max=1000)
    assert came[:2] == [
        Skipped("large: arrays of more than 1000 bytes in all"),
        Skipped("none: it  [2Jwas refused"),
    ]
    assert isinstance(came[2], Expectation)
    assert sorted(came[2].inputs) == ["o", "x"]
    assert (tmp_path / "e").stat().st_size < 1000


HEAD = b'{"inputs": [["x", "FP32", [-1], false]], "outputs": [["y", "FP32", [-1], false]]}\n'
X, Y = ["x", "FP32", [2], 8], ["y", "FP32", [1], 4]


def run_line(inputs: object, outputs: object, **more: object) -> bytes:
    fields = {"run": "one", "inputs": inputs, "outputs": outputs, **more}
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "a line that does not end"),
        (b"x" * (5 << 20), "longer than 4194304 bytes"),
        (b"\xff\n", "a line that is not JSON"),
        (b"[" * 100_000 + b"\n", "a line that is not JSON"),
        (b"{}\n", "does not begin with the tensors of a model"),
        (b'{"inputs": [["x", "FP31", [], false]], "outputs": []}\n', "a tensor that is none"),
        (b'{"inputs": [["x", "FP32", [-2], false]], "outputs": []}\n', "a tensor that is none"),
        (b'{"inputs": [["x", "FP32", [true], false]], "outputs": []}\n', "a tensor that is none"),
        (HEAD + b"{}\n", "neither a run nor the reason"),
        (HEAD + b'{"skipped": "a"}', "a line that does not end"),
        (HEAD + b'{"skipped": ""}\n' * 10_001, "more than 10000 runs"),
        (HEAD + run_line([X], [Y], more=1) + bytes(12), "neither a run nor the reason"),
        (HEAD + run_line([X], []) + bytes(8), r"a run without the tensors \['y'\]"),
        (HEAD + run_line([X, X], [Y]) + bytes(20), "an array 'x' of FP32, which is no tensor"),
        (HEAD + run_line([["z", *X[1:]]], [Y]) + bytes(12), "an array 'z' of FP32, which is no"),
        (HEAD + run_line([["x", "INT32", [2], 8]], [Y]) + bytes(12), "'x' of INT32, which is no"),
        (HEAD + run_line([["x", "FP32", [3], 8]], [Y]) + bytes(12), "needs 12 bytes, got 8"),
        (HEAD + run_line([["x", "FP32", [-1], 8]], [Y]) + bytes(12), "a negative dimension"),
        (HEAD + run_line([["x", "FP32", [2.0], 8]], [Y]) + bytes(12), "whose shape is none"),
        (HEAD + run_line([["x", "FP32", [0] * 17, 0]], [Y]) + bytes(4), "has 17 dimensions"),
        (HEAD + run_line([["x", "FP32", [2], -8]], [Y]), "of -8 bytes, which are not there"),
        (HEAD + run_line([["x", "FP32", [1 << 40], 4 << 40]], [Y]), "which are not there"),
        (HEAD + run_line([X], [Y]) + bytes(11), "'y' of 4 bytes, which are not there"),
        (HEAD + run_line([X], [None]) + bytes(8), "an array that is none"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "e"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(NoExpectations, match=expected):
        list(read_expectations(file)[1])
