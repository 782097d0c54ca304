# SPDX-License-Identifier: Apache-2.0
"""What plans do when they run, whoever plays TensorRT: tests to be imported by those who say how a
plan is loaded.

Fixtures: `load_plan_of(path, profiles, notes, **options)` makes an engine of an ONNX file's plan;
`is_rtx`: TensorRT for RTX made it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.conftest import WriteModel
from thirdrail_engines import EngineError
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.tensorrt.engine import KernelNotes

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = helper.make_node
Load = Callable[..., CudaEngine]


def double_model(write_model: WriteModel) -> Path:
    return write_model(
        [Node("Add", ["x", "x"], ["y"])], {"x": (FLOAT, ["n"])}, {"y": (FLOAT, ["n"])}
    )


def test_fixed_shapes_need_no_profile(write_model: WriteModel, load_plan_of: Load) -> None:
    path = write_model([Node("Neg", ["x"], ["y"])], {"x": (FLOAT, [4])}, {"y": (FLOAT, [4])})
    engine = load_plan_of(path)
    x = np.arange(4, dtype=np.float32)
    for _ in range(4):
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (-x).tolist()


def test_results_whose_size_only_the_run_tells(write_model: WriteModel, load_plan_of: Load) -> None:
    path = write_model(
        [Node("NonZero", ["x"], ["y"]), Node("Neg", ["x"], ["minus"])],
        {"x": (FLOAT, ["n"])},
        {"y": (INT64, [1, "k"]), "minus": (FLOAT, ["n"])},
    )
    engine = load_plan_of(path, open_output_bytes_max=800)
    for found in (1, 100, 3, 0):
        x = np.zeros(200, np.float32)
        x[:found] = 1
        answer = engine.run({"x": x}, ["y", "minus"], {})
        assert answer["y"].tolist() == [list(range(found))]
        assert answer["minus"].tolist() == (-x).tolist()
    x[:101] = 1
    with pytest.raises(EngineError, match=r"output 'y': takes \d+ bytes, at most 800 are allowed"):
        engine.run({"x": x}, ["y"], {})


def test_graphs_are_recorded_by_the_runtime_or_by_us(
    write_model: WriteModel, load_plan_of: Load, is_rtx: bool
) -> None:
    engine = load_plan_of(double_model(write_model), overlapped_runs=1)
    for turn in range(5):
        x = np.full(4, turn, np.float32)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [2 * turn] * 4
    (figures,) = engine.graph_figures
    assert (figures.recorded, figures.launched) == ((0, 0) if is_rtx else (1, 3))


def test_finished_kernels_are_given_to_the_next_process(
    write_model: WriteModel, load_plan_of: Load, is_rtx: bool
) -> None:
    kept: list[bytes] = []
    notes = KernelNotes(lambda: kept[-1] if kept else None, kept.append)
    path = double_model(write_model)
    x = np.ones(3, np.float32)
    for _ in range(2):
        engine = load_plan_of(path, notes=notes)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [2] * 3
        engine.close()
    assert bool(kept) == is_rtx  # TensorRT finishes its kernels when it builds
