# SPDX-License-Identifier: Apache-2.0
"""Runs whose tensors stay on the device, and which nobody waits for, on a twin."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.twin_runs import Load, compute_stream, wait_until
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.placed import Placement
from thirdrail_engines.cuda.twin import TwinDevice

X = np.array([0, 3, 0, 5], np.float32)


class OnDevice:
    """See Placed. Memory of the device with X in it."""

    flags = SimpleNamespace(c_contiguous=True)
    shape, dtype, nbytes = X.shape, X.dtype, X.nbytes

    def __init__(self, device: TwinDevice) -> None:
        self.address = device.allocate(X.nbytes)
        self.memory = device.memory_at(self.address, X.nbytes, "").view(np.float32)
        self.memory[:] = X


@pytest.fixture
def places(device: TwinDevice) -> Iterator[tuple[OnDevice, OnDevice]]:
    made = OnDevice(device), OnDevice(device)
    yield made
    for each in made:
        device.free(each.address)


def given(engine: CudaEngine, output: str, places: tuple[OnDevice, OnDevice]) -> Mapping[str, Any]:
    """Run on what is there. Returns the result's shape when the device has the run."""
    x, y = places
    shapes: dict[str, Any] = {}

    def place(own: Mapping[str, Any]) -> dict[str, int]:
        shapes.update(own)
        return {output: y.address}

    placement = Placement([output], None, place, lambda stream: None, is_in_place=True)
    engine.run_batch({"x": [x]}, [], lambda results: None, [placement])
    return shapes


def test_close_waits_for_runs_that_nobody_waits_for(
    double: Path,
    device: TwinDevice,
    load_model: Load,
    places: tuple[OnDevice, OnDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it frees memory that they use."""
    engine = load_model(double)
    stream = compute_stream(engine)
    with stream.held():
        assert given(engine, "y", places) == {"y": (4,)}
        closing = threading.Thread(target=engine.close)
        monkeypatch.setattr(device, "free", lambda _: pytest.fail("freed in use"))
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        monkeypatch.undo()
    closing.join()
    assert places[1].memory.tolist() == (2 * X).tolist()


@pytest.mark.parametrize("overlapped_runs", [1, 2])
def test_a_run_begins_when_the_last_one_in_its_memory_is_over(
    double: Path, load_model: Load, places: tuple[OnDevice, OnDevice], overlapped_runs: int
) -> None:
    """What nobody waits for stays as little as what is waited for."""
    engine = load_model(double, overlapped_runs=overlapped_runs)
    context: Any = engine._instances[0]._context
    with ThreadPoolExecutor(1) as pool:
        with compute_stream(engine).held():
            for _ in range(overlapped_runs):
                given(engine, "y", places)
            next_run = pool.submit(given, engine, "y", places)
            wait_until(lambda: engine._slots.busy == 1)
            with pytest.raises(TimeoutError):
                next_run.result(0.05)
            assert context.enqueued == overlapped_runs
        assert next_run.result(20) == {"y": (4,)}
    compute_stream(engine).synchronize()
    assert places[1].memory.tolist() == (2 * X).tolist()


def test_memory_that_grows_is_not_replaced_while_a_run_writes_it(
    nonzero: Path, load_model: Load, places: tuple[OnDevice, OnDevice], monkeypatch: Any
) -> None:
    """An output of open size has such memory, also where nobody wants it."""
    engine = load_model(nonzero, overlapped_runs=1)
    context: Any = engine._instances[0]._context
    stream = compute_stream(engine)
    fill = context._fill_open

    def fill_and_hold(*arguments: Any) -> None:
        stream._gate.clear()
        fill(*arguments)

    monkeypatch.setattr(context, "_fill_open", fill_and_hold)
    assert given(engine, "minus", places) == {"minus": (4,)}
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        next_run = pool.submit(given, engine, "minus", places)
        wait_until(lambda: engine._slots.busy == 1)
        with pytest.raises(TimeoutError):
            next_run.result(0.05)
        assert context.enqueued == 1
        stream._gate.set()
        assert next_run.result(20) == {"minus": (4,)}
    stream.synchronize()
    assert places[1].memory.tolist() == (-X).tolist()


def test_a_thread_has_the_device_before_a_library_computes_on_it(
    double: Path, load_model: Load, places: tuple[OnDevice, OnDevice]
) -> None:
    """Also where nothing is copied to it before."""
    engine = load_model(double)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(given, engine, "y", places).result() == {"y": (4,)}
    compute_stream(engine).synchronize()
    assert places[1].memory.tolist() == (2 * X).tolist()
