# SPDX-License-Identifier: Apache-2.0
"""Inputs that another process writes to while the engine runs: no foreign byte, no crash.

Float data is made of the bytes 1 to 127 only, whoever wrote it. Around it lies memory filled with
0xEE, and what the heap holds is mostly zero: any other byte in a result came from where it should
not.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from support.scribbling import Contents, memory_bytes, scribbled
from thirdrail_engines import Engine, EngineError

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Array = np.ndarray[Any, Any]

COUNT = 4096
ROUNDS_MIN = 2000
PATIENCE = 1000  # runs for each run asked for, until the scribbler has done its part
FLOAT_BYTES = (1, 127)


def float_data(seed: int) -> Array:
    low, high = FLOAT_BYTES
    random = np.random.default_rng(seed)
    return random.integers(low, high + 1, 4 * COUNT, dtype=np.uint8).view(np.float32)


# The node, its inputs, and two contents for each: what is there, and what is written over it.
X = (float_data(0), float_data(1))
INDICES = np.arange(COUNT)
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, tuple[Array, Array]]]] = {
    "Gather": (
        helper.make_node("Gather", ["x", "steer"], ["y"]),
        {"x": (FLOAT, ["n"]), "steer": (INT64, ["k"])},
        {"x": X, "steer": (INDICES, INDICES + COUNT)},  # into the memory behind x
    ),
    "Compress": (
        helper.make_node("Compress", ["x", "steer"], ["y"], axis=0),
        {"x": (FLOAT, ["n"]), "steer": (BOOL, ["n"])},
        {"x": X, "steer": (INDICES % 3 == 0, INDICES >= 0)},
    ),
    "Reshape": (
        helper.make_node("Reshape", ["x", "steer"], ["y"]),
        {"x": (FLOAT, ["n"]), "steer": (INT64, ["k"])},
        {"x": X, "steer": (np.array([2, COUNT // 2]), np.array([COUNT, COUNT]))},
    ),
}


@pytest.mark.parametrize("operator", sorted(MODELS))
def test_a_scribbling_client_learns_nothing_and_breaks_nothing(
    request: pytest.FixtureRequest,
    write_model: Callable[..., Path],
    load_model: Callable[[Path], Engine],
    operator: str,
) -> None:
    node, inputs, contents = MODELS[operator]
    engine = load_model(write_model([node], inputs, {"y": (FLOAT, None)}))
    positional = engine.spec.positional_inputs
    assert positional == ({"x"} if operator != "Compress" else frozenset())
    runs_min = 10_000 if request.config.getoption("--all", default=False) else 1000
    runs = answered = refused = 0
    with scribbled_arrays(contents) as (views, rounds):
        while runs < runs_min or rounds() < ROUNDS_MIN or not answered:
            runs += 1
            assert runs < runs_min * PATIENCE, "the scribbler hardly ran"
            # As the worker does: what is not read by position is copied first.
            fed = {n: view if n in positional else view.copy() for n, view in views.items()}
            try:
                result = engine.run(fed, ["y"], {})["y"]
            except EngineError:
                refused += 1
                continue
            answered += 1
            assert result.size == (
                np.count_nonzero(fed["steer"]) if operator == "Compress" else COUNT
            )
            found = result.view(np.uint8)
            assert FLOAT_BYTES[0] <= found.min()
            assert found.max() <= FLOAT_BYTES[1]
    assert answered + refused == runs


@contextmanager
def scribbled_arrays(
    contents: Contents,
) -> Iterator[tuple[dict[str, Array], Callable[[], int]]]:
    """Arrays in memory that a scribbler writes to, and how many rounds it has made."""
    size = memory_bytes(contents)
    fd = os.memfd_create("scribbled")
    try:
        os.ftruncate(fd, size)
        with scribbled(fd, size, contents) as scribbling:
            memory = mmap.mmap(fd, size)
            views = {
                name: np.frombuffer(
                    memory, whole.dtype, whole.size, scribbling.places[name]
                ).reshape(whole.shape)
                for name, (whole, _) in contents.items()
            }
            yield views, scribbling.rounds
    finally:
        os.close(fd)
