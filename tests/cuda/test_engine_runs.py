# SPDX-License-Identifier: Apache-2.0
"""The engine for devices, on a twin: order, overlap, failures."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engines.conftest import WriteModel
from support.twin_runs import FLOAT, Load, Node, compute_stream, wait_until
from support.twins import twin_engine
from thirdrail_engines import Inspector
from thirdrail_engines.cuda.instance import OVERLAP_BYTES_MIN
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.engine import DeviceLost, EngineError


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
        failures = [run.exception(timeout=30) for run in runs]
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
