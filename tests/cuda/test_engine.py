# SPDX-License-Identifier: Apache-2.0
"""The engine for devices, on a twin: shapes, copies, graphs, order, failures."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.conftest import WriteModel
from engines.test_engine_contract import ELEMENT_TYPES
from support.twins import twin_engine
from thirdrail_engines import Engine, Inspector, ModelFileError
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.instance import OVERLAP_BYTES_MIN
from thirdrail_engines.cuda.twin import TWIN_FACTS, TwinDevice, TwinStream
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.plans import Profile, ShapeRange

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = helper.make_node
Load = Callable[..., CudaEngine]

TYPES = sorted(name for name in ELEMENT_TYPES if name != "BYTES")


@pytest.fixture
def double(write_model: WriteModel) -> Path:
    return write_model(
        [Node("Add", ["x", "x"], ["y"])],
        {"x": (FLOAT, ["n"])},
        {"y": (FLOAT, ["n"])},
    )


@pytest.fixture
def nonzero(write_model: WriteModel) -> Path:
    """The size of y depends on the values of x; that of same does not."""
    return write_model(
        [Node("NonZero", ["x"], ["y"]), Node("Neg", ["x"], ["minus"])],
        {"x": (FLOAT, ["n"])},
        {"y": (INT64, [1, "k"]), "minus": (FLOAT, ["n"])},
    )


@pytest.fixture
def gather(write_model: WriteModel) -> Path:
    """An index out of bounds is to the twin what an illegal access is to a GPU."""
    return write_model(
        [Node("Gather", ["x", "index"], ["y"])],
        {"x": (FLOAT, ["n"]), "index": (INT64, ["k"])},
        {"y": (FLOAT, ["k"])},
    )


def compute_stream(engine: CudaEngine, number: int = 0) -> TwinStream:
    stream = engine._instances[number]._compute
    assert isinstance(stream, TwinStream)
    return stream


# Types and shapes


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, (2, 3)) for name in TYPES] + [("FP32", shape) for shape in ((), (0,), (0, 3))],
    ids=str,
)
def test_every_type_and_shape_passes_unchanged(
    identity: Callable[..., Engine], name: str, shape: tuple[int, ...]
) -> None:
    engine = identity(ELEMENT_TYPES[name], [f"d{axis}" for axis in range(len(shape))])
    dtype = engine.spec.inputs[0].dtype.numpy
    assert dtype is not None
    x = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    y = engine.run({"x": x}, ["y"], {})["y"]
    assert (y.shape, y.dtype, y.tolist()) == (shape, x.dtype, x.tolist())


def test_a_shape_that_no_profile_takes_is_refused_with_those_that_are(
    double: Path, load_model: Load
) -> None:
    profiles = tuple(
        Profile({"x": ShapeRange((low,), (low,), (high,))}) for low, high in ((1, 4), (100, 200))
    )
    engine = load_model(double, profiles=profiles)
    for count in (1, 4, 100, 200):
        assert engine.run({"x": np.ones(count, np.float32)}, ["y"], {})["y"].shape == (count,)
    with pytest.raises(EngineError) as caught:
        engine.run({"x": np.ones(50, np.float32)}, ["y"], {})
    assert str(caught.value) == (
        "input 'x' has the shape [50], this model takes [1] to [4] or [100] to [200]"
    )


def test_a_result_whose_size_only_the_run_tells(nonzero: Path, load_model: Load) -> None:
    engine = load_model(nonzero)
    for found in (0, 1, 1000, 3):
        x = np.zeros(2000, np.float32)
        x[:found] = 1
        answer = engine.run({"x": x}, ["y", "minus"], {})
        assert answer["y"].tolist() == [list(range(found))]
        assert answer["minus"].tolist() == (-x).tolist()
    target = np.zeros((1, 3), np.int64)
    assert engine.run({"x": x}, ["y"], {"y": target})["y"].tolist() == [[0, 1, 2]]


def test_a_result_that_is_too_large_fails_its_run_alone(nonzero: Path, load_model: Load) -> None:
    engine = load_model(nonzero, open_output_bytes_max=80)
    x = np.zeros(100, np.float32)
    x[:11] = 1
    with pytest.raises(EngineError, match="output 'y': takes 88 bytes, at most 80 are allowed"):
        engine.run({"x": x}, ["y"], {})
    x[10] = 0
    assert engine.run({"x": x}, ["y"], {})["y"].shape == (1, 10)


def test_an_input_changed_during_the_run_changes_nothing(double: Path, load_model: Load) -> None:
    """What is computed with is a copy that was made before the engine began to wait."""
    engine = load_model(double)
    x = np.ones(100_000, np.float32)
    with ThreadPoolExecutor(1) as pool:
        with compute_stream(engine).held():
            run = pool.submit(engine.run, {"x": x}, ["y"], {})
            wait_until(lambda: engine._instances[0]._context.enqueued > 0)  # type: ignore[union-attr]
            x[:] = 7
        assert (run.result()["y"] == 2).all()


@pytest.mark.parametrize("count", [3, 100_000], ids=["small", "large"])
def test_results_never_share_memory_with_inputs(
    write_model: WriteModel, load_model: Load, count: int
) -> None:
    engine = load_model(
        write_model(
            [Node("Identity", ["x"], ["same"]), Node("Add", ["x", "zero"], ["added"])],
            {"x": (FLOAT, ["n"])},
            {"same": (FLOAT, ["n"]), "added": (FLOAT, ["n"])},
            {"zero": np.array(0, np.float32)},
        )
    )
    x = np.arange(count, dtype=np.float32)
    for into in ({}, {"same": np.zeros_like(x)}):
        for result in engine.run({"x": x}, ["same", "added"], into).values():
            assert result.tolist() == x.tolist()
            assert not np.shares_memory(result, x)


# Memory


def test_a_request_takes_no_device_memory(
    double: Path, device: TwinDevice, load_model: Load
) -> None:
    engine = load_model(double)
    free = device.memory().free_bytes
    for count in (1, 1000, 100_000):
        engine.run({"x": np.ones(count, np.float32)}, ["y"], {})
    assert device.memory().free_bytes == free


def test_a_model_that_does_not_fit_is_refused_with_figures(
    double: Path, inspector: Inspector
) -> None:
    device = TwinDevice(replace(TWIN_FACTS, memory_bytes=1_000_000))
    with pytest.raises(ModelFileError) as caught:
        twin_engine(double, device, inspector, elements_max=100_000)
    assert str(caught.value) == (
        f"the model does not fit on {TWIN_FACTS.uuid}: 1000000 bytes are free, the largest "
        "inputs alone take 800000 in 1 instances of 2 overlapped runs each"
    )
    device.close()


def test_without_room_for_staging_it_copies_directly(double: Path, load_model: Load) -> None:
    engine = load_model(double, staging_bytes_max=8192)
    for count, refused in ((10, 0), (100_000, 2)):
        x = np.arange(count, dtype=np.float32)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (2 * x).tolist()
        assert engine.staging_figures.refused == refused


# Graphs


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


# Order and overlap


def test_the_next_inputs_go_in_while_one_run_computes(double: Path, load_model: Load) -> None:
    engine = load_model(double)
    count = OVERLAP_BYTES_MIN // 4
    with ThreadPoolExecutor(2) as pool:
        with compute_stream(engine).held():
            runs = [
                pool.submit(engine.run, {"x": np.full(count, v, np.float32)}, ["y"], {})
                for v in (1, 2)
            ]
            slots = engine._instances[0].slots
            # Both have been copied in, none has been computed.
            wait_until(lambda: all(s.is_in.last_record is not None for s in slots))  # type: ignore[attr-defined]
            wait_until(lambda: all(slot.is_in.is_done() for slot in slots))
            assert not any(run.done() for run in runs)
        assert [run.result()["y"][0] for run in runs] == [2, 4]


def test_a_third_run_waits_for_a_slot(double: Path, load_model: Load) -> None:
    engine = load_model(double)
    with ThreadPoolExecutor(3) as pool:
        with compute_stream(engine).held():
            runs = [
                pool.submit(engine.run, {"x": np.full(2, v, np.float32)}, ["y"], {})
                for v in range(3)
            ]
            wait_until(lambda: engine._slots.busy == 2)
            time.sleep(0.02)
            assert engine._slots.busy == 2
        assert sorted(run.result()["y"][0] for run in runs) == [0, 2, 4]


def test_instances_run_side_by_side(double: Path, load_model: Load) -> None:
    engine = load_model(double, instances=2, overlapped_runs=1)
    with compute_stream(engine, 0).held(), ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(engine.run, {"x": np.ones(2, np.float32)}, ["y"], {}) for _ in "ab"]
        wait_until(lambda: any(run.done() for run in runs))  # on the other instance
        assert sorted(run.done() for run in runs) == [False, True]
        compute_stream(engine, 0)._gate.set()


def test_many_threads_get_their_own_results(write_model: WriteModel, load_model: Load) -> None:
    """Sizes on both sides of the overlap, shapes that repeat and are recorded, two instances."""
    engine = load_model(
        write_model(
            [Node("Mul", ["x", "f"], ["y"]), Node("Add", ["x", "f"], ["z"])],
            {"x": (FLOAT, ["n"]), "f": (FLOAT, [1])},
            {"y": (FLOAT, ["n"]), "z": (FLOAT, ["n"])},
        ),
        instances=2,
        graphs_max=3,
        staging_bytes_max=2 << 20,
    )

    def caller(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(30):
            x = random.random(int(random.choice([1, 7, 90_000])), np.float32)
            f = np.array([number], np.float32)
            wanted = [["y"], ["z"], ["z", "y"]][int(random.integers(3))]
            into = {wanted[0]: np.empty_like(x)} if random.random() < 0.5 else {}
            answer = engine.run({"x": x, "f": f}, wanted, into)
            assert list(answer) == wanted
            for name, expected in (("y", x * f), ("z", x + f)):
                assert name not in answer or (answer[name] == expected).all()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(caller, number) for number in range(8)]:
            done.result()
    assert sum(figures.launched for figures in engine.graph_figures) > 0


# Failures


def test_a_failed_call_fails_its_run_alone(
    double: Path, device: TwinDevice, load_model: Load
) -> None:
    engine = load_model(double, graphs_max=0)
    x = np.arange(3, dtype=np.float32)
    for call in ("cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoHAsync", "cuEventRecord"):
        device.fail_next(call, "CUDA_ERROR_INVALID_HANDLE")
        with pytest.raises(EngineError, match="invalid handle"):
            engine.run({"x": x}, ["y"], {})
        for _ in range(3):
            assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [0, 2, 4]
    assert engine.staging_figures.lent_bytes == 0


def test_an_illegal_access_takes_the_device_and_every_run_says_so(
    gather: Path, inspector: Inspector
) -> None:
    device = TwinDevice()
    engine = twin_engine(gather, device, inspector)
    x = np.arange(3, dtype=np.float32)
    assert engine.run({"x": x, "index": np.array([2])}, ["y"], {})["y"].tolist() == [2]
    with pytest.raises(DeviceLost, match=r"the device was lost: .*: illegal address"):
        engine.run({"x": x, "index": np.array([7])}, ["y"], {})
    with pytest.raises(DeviceLost):
        engine.run({"x": x, "index": np.array([2])}, ["y"], {})
    engine.close()  # what it held is gone, and that is no error
    device.close()


def test_runs_that_wait_when_the_device_is_lost_end(gather: Path, inspector: Inspector) -> None:
    device = TwinDevice()
    engine = twin_engine(gather, device, inspector, instances=2, elements_max=1000)
    x = np.arange(3, dtype=np.float32)
    with ThreadPoolExecutor(4) as pool:
        with compute_stream(engine, 0).held():
            runs = [
                pool.submit(engine.run, {"x": x, "index": np.array([index])}, ["y"], {})
                for index in (0, 1, 9, 2)
            ]
            wait_until(lambda: engine._slots.busy + sum(run.done() for run in runs) >= 4)
        failures = [run.exception(timeout=5) for run in runs]
    assert any(isinstance(failure, DeviceLost) for failure in failures)
    assert all(failure is None or isinstance(failure, DeviceLost) for failure in failures)
    engine.close()
    device.close()


def test_results_of_another_shape_are_refused_when_the_device_is_quiet(
    double: Path, load_model: Load
) -> None:
    """The array must not be written to after the refusal: its owner has it back."""
    engine = load_model(double)
    target = np.zeros(99_999, np.float32)
    with pytest.raises(EngineError, match=r"has the shape \[100000\]"):
        engine.run({"x": np.ones(100_000, np.float32)}, ["y"], {"y": target})
    assert not target.any()
    assert engine.staging_figures.lent_bytes == 0


def test_close_waits_for_nobody_and_leaves_nothing(double: Path, inspector: Inspector) -> None:
    device = TwinDevice()
    closed = threading.Event()
    engine = twin_engine(double, device, inspector)
    engine._on_close = closed.set
    engine.run({"x": np.ones(3, np.float32)}, ["y"], {})
    engine.close()
    assert closed.is_set()
    assert device.memory().free_bytes == device.facts.memory_bytes
    device.close()


def wait_until(is_so: Callable[[], bool], s_max: float = 5) -> None:
    end = time.monotonic() + s_max
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)
