# SPDX-License-Identifier: Apache-2.0
"""The memory that engines on a device share to compute in: how much, whose turn, and failures.

The twin's programs write to it, and read again what they wrote when they are done: two runs in the
same bytes are a lost device.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.twin_runs import Load, compute_stream, wait_until
from support.twins import twin_engine
from thirdrail_engines import Inspector, ModelFileError, cuda_engines
from thirdrail_engines.cuda.activation_rooms import (
    ROOMS_MIN,
    Contexts,
    RoomState,
    best_room,
    change_of,
    room_sizes,
)
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TWIN_FACTS, TwinDevice
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_server.control_messages import Resident, WorkerMemory
from thirdrail_server.worker.worker_device import WorkerDevice

MODELS = st.lists(st.builds(Contexts, st.integers(0, 100), st.integers(1, 5)), max_size=8)


# How much


@given(MODELS)
def test_every_model_finds_room_for_all_of_its_contexts(models: list[Contexts]) -> None:
    sizes = room_sizes(models)
    for model in models:
        assert sum(size >= model.nbytes for size in sizes) >= model.count or not model.nbytes
    assert sum(sizes) <= sum(model.nbytes * model.count for model in models)
    assert len(sizes) <= max([ROOMS_MIN, *(model.count for model in models)])


@given(st.lists(MODELS, max_size=6))
def test_rooms_that_change_with_the_models_cover_them(steps: list[list[Contexts]]) -> None:
    rooms: list[int] = []
    for models in [*steps, []]:
        wanted = room_sizes(models)
        change = change_of(rooms, wanted)
        rooms = [size for number, size in enumerate(rooms) if number not in change.surplus]
        rooms = sorted([*rooms, *change.new], reverse=True)
        assert len(rooms) == len(wanted)
        assert all(size >= need for size, need in zip(rooms, wanted, strict=True))
    assert rooms == []


@given(MODELS, st.data())
def test_a_model_that_leaves_needs_no_new_rooms(models: list[Contexts], data: Any) -> None:
    sizes = room_sizes(models)
    left = data.draw(st.lists(st.sampled_from(models), unique_by=id) if models else st.just([]))
    fewer = [model for model in models if not any(model is gone for gone in left)]
    assert change_of(sizes, room_sizes(fewer)).new == ()


def test_the_best_room_is_ones_own_then_an_idle_one_then_the_oldest() -> None:
    own = RoomState(100, is_own=True, is_idle=True, turn=9)
    small = RoomState(10, is_own=False, is_idle=True, turn=8)
    large = RoomState(100, is_own=False, is_idle=True, turn=1)
    busy, older = (RoomState(100, is_own=False, is_idle=False, turn=turn) for turn in (7, 3))
    assert best_room([small, large, busy, own], 10) == 3
    assert best_room([busy, large, small], 10) == 2
    assert best_room([busy, large, small], 11) == 1
    assert best_room([busy, older], 11) == 1
    assert best_room([small], 11) is None


def test_what_models_share_weighs_with_none_of_them(
    double: Path, load_model: Load, device: TwinDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_engines, "own_device", lambda uuid: device)
    worker = WorkerDevice(device.facts.uuid)
    weights = []
    for _ in range(3):
        before = worker.taken_bytes()
        load_model(double, elements_max=100, activation_bytes=1_000_000)
        weights.append(worker.taken_bytes() - before)
    assert weights[0] == weights[1] == weights[2] < 10_000
    assert worker.shared_bytes() == 2_000_000
    memory = WorkerMemory([Resident("a", weights[0], 0)], 5, worker.shared_bytes())
    assert memory.total == weights[0] + 5 + 2_000_000
    assert WorkerMemory.from_fields(memory.to_fields()) == memory


# Whose turn


def test_models_share_two_rooms_and_the_last_one_leaves_nothing(
    double: Path, device: TwinDevice, inspector: Inspector
) -> None:
    sizes = (1000, 500, 3000, 200)
    engines = [
        twin_engine(double, device, inspector, elements_max=100, activation_bytes=size)
        for size in sizes
    ]
    assert device.activations.nbytes == 3000 + 1000
    x = np.arange(5, dtype=np.float32)
    for engine in [*engines, *engines, *engines]:
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (2 * x).tolist()
    for engine in engines:
        engine.close()
    assert device.activations.nbytes == 0
    assert device.memory().free_bytes == device.facts.memory_bytes


def test_two_runs_never_compute_in_the_same_bytes(
    double: Path, load_model: Load, device: TwinDevice
) -> None:
    """Three models, two rooms, a run that does not end: the third one waits on the device."""
    engines = [load_model(double, elements_max=100, activation_bytes=1000) for _ in range(3)]
    begun = [threading.Event() for _ in engines]
    may_end = threading.Event()

    def slowly(plain: Callable[..., Any], event: threading.Event) -> Callable[..., Any]:
        def compute(feed: Any) -> Any:
            event.set()
            may_end.wait(30)
            return plain(feed)

        return compute

    for engine, event in zip(engines, begun, strict=True):
        program: Any = engine._program
        program.compute = slowly(program.compute, event)
    with ThreadPoolExecutor(3) as pool:
        runs = []
        for engine, event in zip(engines, begun, strict=True):
            runs.append(pool.submit(engine.run, {"x": np.ones(2, np.float32)}, ["y"], {}))
            if engine is not engines[-1]:
                assert event.wait(30)
        wait_until(lambda: engines[-1]._instances[0]._context.enqueued > 0, 30)  # type: ignore[union-attr]
        assert not begun[-1].is_set()
        may_end.set()
        assert [run.result(timeout=30)["y"].tolist() for run in runs] == [[2, 2]] * 3


def test_many_models_and_threads_get_their_own_results(double: Path, load_model: Load) -> None:
    """Graphs are recorded and launched; rooms change hands; models come and go meanwhile."""
    engines = [
        load_model(double, elements_max=100, activation_bytes=500 * (1 + n), instances=1 + n % 2)
        for n in range(4)
    ]

    def caller(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(30):
            engine = engines[int(random.integers(len(engines)))]
            x = random.random(int(random.choice([1, 7, 90])), np.float32)
            assert (engine.run({"x": x}, ["y"], {})["y"] == 2 * x).all()

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(caller, number) for number in range(6)]
        for size in (4000, 100, 5000):
            load_model(double, elements_max=100, activation_bytes=size).close()
        for done in running:
            done.result()
    figures = [each for engine in engines for each in engine.graph_figures]
    assert sum(each.launched for each in figures) > 0


def test_a_graph_is_launched_with_the_memory_that_it_was_recorded_with(
    double: Path, load_model: Load, device: TwinDevice
) -> None:
    engine = load_model(double, elements_max=100, activation_bytes=1000, overlapped_runs=1)
    x = np.arange(3, dtype=np.float32)
    for _ in range(4):
        engine.run({"x": x}, ["y"], {})
    assert engine.graph_figures[0].launched == 2
    load_model(double, elements_max=100, activation_bytes=2000)  # and takes the first room's place
    (first, *_), stream = device.activations._rooms, compute_stream(engine)
    elsewhere = device.new_stream()
    with device.activations.lent(1000, elsewhere) as address:
        assert address == first.address  # so that the engine has to take the other one
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [0, 2, 4]
    elsewhere.close()
    assert first.stream is not stream
    assert engine.graph_figures[0].launched == 2


# Failures


def test_a_model_without_room_is_refused_and_changes_nothing(
    double: Path, inspector: Inspector
) -> None:
    device = TwinDevice(replace(TWIN_FACTS, memory_bytes=1_000_000))
    first = twin_engine(double, device, inspector, elements_max=100, activation_bytes=1000)
    with pytest.raises(ModelFileError, match=r"fit on .* computes in 2000000 more"):
        twin_engine(double, device, inspector, elements_max=100, activation_bytes=2_000_000)
    assert device.activations.nbytes == 1000
    first.run({"x": np.ones(2, np.float32)}, ["y"], {})
    first.close()
    device.close()


@pytest.mark.parametrize("call", ["cuStreamWaitEvent", "cuEventQuery", "cuEventRecord"])
def test_a_call_that_fails_fails_its_run_alone(
    double: Path, load_model: Load, device: TwinDevice, call: str
) -> None:
    engines: list[CudaEngine] = [
        load_model(double, elements_max=100, activation_bytes=1000, graphs_max=0) for _ in range(3)
    ]
    x = np.arange(3, dtype=np.float32)
    for engine in engines:  # so that the third takes a room from another
        engine.run({"x": x}, ["y"], {})
    device.fail_next(call, "CUDA_ERROR_INVALID_HANDLE")
    for engine in engines:
        with contextlib.suppress(EngineError):
            engine.run({"x": x}, ["y"], {})
    for engine in engines:
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [0, 2, 4]


def test_where_the_order_cannot_be_had_the_device_is_lost(double: Path, device: TwinDevice) -> None:
    share = device.activations.join(1000, 1)
    stream, other = device.new_stream(), device.new_stream()
    lent = share.lent(stream)
    lent.__enter__()
    for call in ("cuEventRecord", "cuStreamSynchronize"):
        device.fail_next(call, "CUDA_ERROR_INVALID_HANDLE")
    with pytest.raises(DeviceLost, match="nothing tells when it is done"):
        lent.__exit__(None, None, None)
    with pytest.raises(DeviceLost, match="nothing tells"):
        share.lent(other).__enter__()
    share.close()
    for each in (stream, other):
        each.close()


def test_a_lost_device_frees_nothing_twice(
    double: Path, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = TwinDevice()
    engines = [
        twin_engine(double, device, inspector, elements_max=100, activation_bytes=1000)
        for _ in range(3)
    ]
    share = device.activations.join(5000, 4)
    freed: list[int] = []
    plain_free = device.free

    def free(address: int) -> None:
        freed.append(address)
        plain_free(address)

    monkeypatch.setattr(device, "free", free)
    device.fail("CUDA_ERROR_ILLEGAL_ADDRESS")
    for engine in engines:
        with pytest.raises(DeviceLost):
            engine.run({"x": np.ones(2, np.float32)}, ["y"], {})
    for engine in engines:
        engine.close()
    with pytest.raises(DeviceLost):
        share.close()
    share.close()
    assert len(freed) == len(set(freed))
    device.close()
