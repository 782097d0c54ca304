# SPDX-License-Identifier: Apache-2.0
"""What the engine for devices records and launches again, on a twin."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.twin_runs import Load
from thirdrail_engines import Engine, EngineOptions, Inspector
from thirdrail_engines.cuda.twin import TwinDevice, TwinStream
from thirdrail_engines.onnxruntime_engine import load_onnx
from thirdrail_engines.plans import Profile
from thirdrail_engines.profiles import read_shape_range
from thirdrail_engines.reference_proof import Tolerance, prove

PROFILES = (Profile({"x": read_shape_range("1,4,8")}), Profile({"x": read_shape_range("9,10,20")}))


def test_shapes_that_come_again_are_recorded_and_launched(double: Path, load_model: Load) -> None:
    engine = load_model(double, overlapped_runs=1)
    context: Any = engine._instances[0]._context
    for _ in range(5):
        for count in (3, 5):
            x = np.arange(count, dtype=np.float32)
            assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (2 * x).tolist()
    (figures,) = engine.graph_figures
    assert (figures.recorded, figures.launched, figures.kept) == (2, 6, 2)
    assert context.enqueued == 2 * 3  # once plain; the second time plain and to record


def test_a_graph_holds_what_the_device_computes_and_not_the_values(
    double: Path, load_model: Load
) -> None:
    engine = load_model(double, overlapped_runs=1)
    for value in range(6):
        x = np.full(4, value, np.float32)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [2 * value] * 4
    assert engine.graph_figures[0].launched == 4


def test_graphs_are_bounded(double: Path, load_model: Load) -> None:
    engine = load_model(double, overlapped_runs=1, graphs_max=2)
    for _ in range(3):
        for count in (1, 2):
            engine.run({"x": np.ones(count, np.float32)}, ["y"], {})
    for count in (3, 3):
        engine.run({"x": np.ones(count, np.float32)}, ["y"], {})
    (figures,) = engine.graph_figures
    assert (figures.kept, figures.recorded) == (2, 3)


def test_without_graphs_none_are_recorded(double: Path, load_model: Load) -> None:
    engine = load_model(double, graphs_max=0)
    for _ in range(4):
        engine.run({"x": np.ones(3, np.float32)}, ["y"], {})
    assert engine.graph_figures[0].recorded == 0


def test_open_outputs_are_not_recorded(nonzero: Path, load_model: Load) -> None:
    engine = load_model(nonzero, overlapped_runs=1)
    for _ in range(4):
        engine.run({"x": np.ones(3, np.float32)}, ["y"], {})
    (figures,) = engine.graph_figures
    assert (figures.recorded, figures.refused) == (0, 1)


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuStreamEndCapture"])
def test_a_recording_that_fails_costs_nothing_but_the_graph(
    double: Path, device: TwinDevice, load_model: Load, call: str
) -> None:
    engine = load_model(double, overlapped_runs=1)
    x = np.arange(3, dtype=np.float32)
    engine.run({"x": x}, ["y"], {})
    device.fail_next(call, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
    for _ in range(3):
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [0, 2, 4]
    (figures,) = engine.graph_figures
    assert (figures.recorded, figures.launched, figures.refused) == (0, 0, 1)


def test_what_others_give_meanwhile_is_no_part_of_a_recording(
    double: Path, load_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_model(double)
    context: Any = engine._instances[0]._context
    plain_enqueue = context.enqueue

    def enqueue(stream: TwinStream) -> None:
        if stream.is_capturing:
            others.append(pool.submit(engine.run, {"x": np.full(3, 5, np.float32)}, ["y"], {}))
            time.sleep(0.02)
        plain_enqueue(stream)

    others: list[Any] = []
    monkeypatch.setattr(context, "enqueue", enqueue)
    with ThreadPoolExecutor(1) as pool:
        for value in range(4):
            x = np.full(2, value, np.float32)
            assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [2 * value] * 2
        assert [other.result()["y"].tolist() for other in others] == [[10] * 3]


@pytest.fixture
def reference(double: Path, inspector: Inspector) -> Iterator[Engine]:
    engine = load_onnx(double, options=EngineOptions(), inspector=inspector)
    yield engine
    engine.close()


def test_a_proof_goes_the_way_that_requests_will(
    double: Path, reference: Engine, load_model: Load
) -> None:
    engine = load_model(double, profiles=PROFILES)
    proof = prove(engine, reference, PROFILES, Tolerance(max_abs=1e-6))
    assert proof.is_proven
    assert proof.runs[::5] == ("profile 0 best", "profile 1 largest")
    assert proof.runs[6:] == tuple(f"profile {n} best {time}" for time in (2, 3) for n in (0, 1))
    (figures,) = engine.graph_figures
    assert (figures.recorded, figures.launched) == (2, 2)


def test_a_recording_that_lacks_something_is_not_proven(
    double: Path, reference: Engine, load_model: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is computed, the results of the run before are still there."""
    monkeypatch.setattr(TwinStream, "launch", lambda *_: None)
    proof = prove(load_model(double), reference, (), Tolerance(max_abs=1e-6))
    (fault,) = proof.faults
    assert fault.startswith("output 'y' has max_abs")
