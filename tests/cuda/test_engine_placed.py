# SPDX-License-Identifier: Apache-2.0
"""Runs whose tensors stay on the device, and which nobody waits for, on a twin."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.twin_runs import Load, compute_stream, wait_until
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


def given(engine: Any, output: str, places: tuple[OnDevice, OnDevice]) -> dict[str, Any]:
    x, y = places
    placement = Placement([output], lambda _: {output: y.address}, lambda _: None)
    answer: dict[str, Any] = engine.run_placed({"x": x}, [output], placement)
    return answer


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


def test_a_run_is_waited_for_where_the_next_may_replace_its_memory(
    nonzero: Path, load_model: Load, places: tuple[OnDevice, OnDevice], monkeypatch: Any
) -> None:
    """An output of open size has memory that grows, also where nobody wants it."""
    engine = load_model(nonzero, overlapped_runs=1)
    context: Any = engine._instances[0]._context
    stream, slot = compute_stream(engine), engine._instances[0].slots[0]
    fill = context._fill_open

    def fill_and_hold(*arguments: Any) -> None:
        stream._gate.clear()
        fill(*arguments)

    monkeypatch.setattr(context, "_fill_open", fill_and_hold)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(given, engine, "minus", places)
        wait_until(lambda: slot.is_out.last_record is not None)  # type: ignore[attr-defined]
        try:
            with pytest.raises(TimeoutError):
                run.result(0.05)
        finally:
            stream._gate.set()
        assert run.result() == {"minus": (4,)}
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
