# SPDX-License-Identifier: Apache-2.0
"""Inputs that another process writes to while the engine runs: no foreign byte, no crash.

Float data is made of the bytes 1 to 127 only, whoever wrote it. Around it lies memory filled with
0xEE, and what the heap holds is mostly zero: any other byte in a result came from where it should
not.
"""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from thirdrail_engines import Engine, EngineError

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Array = np.ndarray[Any, Any]

PAGE = mmap.PAGESIZE
COUNT = 4096
ROUNDS_MIN = 20_000
PATIENCE = 1000  # runs for each run asked for, until the scribbler has done its part
FLOAT_BYTES = (1, 127)
ANY_BYTES = (0, 255)


def float_data() -> Array:
    low, high = FLOAT_BYTES
    random = np.random.default_rng(0)
    return random.integers(low, high + 1, 4 * COUNT, dtype=np.uint8).view(np.float32)


MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Array]]] = {
    "Gather": (
        helper.make_node("Gather", ["x", "steer"], ["y"]),
        {"x": (FLOAT, ["n"]), "steer": (INT64, ["k"])},
        {"x": float_data(), "steer": np.arange(COUNT)},
    ),
    "Compress": (
        helper.make_node("Compress", ["x", "steer"], ["y"], axis=0),
        {"x": (FLOAT, ["n"]), "steer": (BOOL, ["n"])},
        {"x": float_data(), "steer": np.arange(COUNT) % 3 == 0},
    ),
    "Reshape": (
        helper.make_node("Reshape", ["x", "steer"], ["y"]),
        {"x": (FLOAT, ["n"]), "steer": (INT64, ["k"])},
        {"x": float_data(), "steer": np.array([2, COUNT // 2])},
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
    with scribbled(contents) as (views, rounds):
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
def scribbled(contents: dict[str, Array]) -> Iterator[tuple[dict[str, Array], Callable[[], int]]]:
    """Arrays in memory that a scribbler writes to, and how many rounds it has made."""
    strides = [-(-array.nbytes // PAGE) * PAGE + PAGE for array in contents.values()]
    size = PAGE + sum(strides) + PAGE
    fd = os.memfd_create("scribbled")
    try:
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        memory[:] = b"\xee" * (size - 8) + bytes(8)
        views, arguments, offset = {}, [], PAGE
        for (name, array), stride in zip(contents.items(), strides, strict=True):
            view = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
            view[...] = array
            views[name] = view
            low, high = FLOAT_BYTES if array.dtype == np.float32 else ANY_BYTES
            arguments.append(f"{offset}:{array.nbytes}:{low}:{high}")
            offset += stride
        command = [
            sys.executable,
            str(Path(__file__).with_name("scribbler.py")),
            str(fd),
            str(size),
        ]
        with subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, pass_fds=[fd]
        ) as scribbler:
            yield views, lambda: int.from_bytes(memory[-8:], "little")
            assert scribbler.poll() is None
            assert scribbler.stdin is not None
            scribbler.stdin.close()
    finally:
        os.close(fd)
