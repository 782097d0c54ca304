# SPDX-License-Identifier: Apache-2.0
"""How often tensor bytes are copied on their way through an engine: measured, not declared."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from thirdrail_engines import Engine

BIG_BYTES = 64 << 20


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "bound"])
def test_the_engine_reads_the_callers_memory_and_lets_others_run(
    waiting_for_x: Engine, in_place: bool
) -> None:
    """The engine ends its rounds when another thread writes to the array that it was given."""
    x = np.zeros(1, np.float32)
    y = np.zeros(1 << 16, np.float32)
    answers: list[Mapping[str, Any]] = []

    def run() -> None:
        answers.append(waiting_for_x.run({"x": x}, ["y"], {"y": y} if in_place else {}))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.05)  # let it get there; a write that comes first makes a run of one round
    x[0] = 1
    thread.join()
    assert answers[0]["y"][0] < 3_000_000


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "bound"])
def test_a_big_run_takes_no_memory_beyond_one_result(
    identity: Callable[..., Engine], in_place: bool
) -> None:
    engine = identity()
    x = np.ones(BIG_BYTES // 4, np.float32)
    y = np.ones_like(x)
    before = reset_peak()
    result = engine.run({"x": x}, ["y"], {"y": y} if in_place else {})["y"]
    grown = memory_bytes("VmHWM") - before
    assert result[-1] == 1
    if in_place:
        assert grown < BIG_BYTES / 4
    else:
        assert BIG_BYTES * 3 / 4 < grown < BIG_BYTES * 5 / 4  # also shows that this test can see


def test_the_addresses_that_onnxruntime_uses_are_the_arrays(
    identity: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    read: list[int] = []
    original_run = ort.InferenceSession.run_with_iobinding
    original_bind = ort.IOBinding.bind_input

    def run(self: Any, binding: Any, *rest: Any) -> None:
        original_run(self, binding, *rest)
        written.extend(value.data_ptr() for value in binding.get_outputs())

    def bind(self: Any, *place: Any) -> None:
        original_bind(self, *place)
        read.append(place[-1])

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    monkeypatch.setattr(ort.IOBinding, "bind_input", bind)
    x = np.ones(1 << 20, np.float32)
    y = np.zeros_like(x)
    identity().run({"x": x}, ["y"], {"y": y})
    assert (read, written) == ([x.ctypes.data], [y.ctypes.data])
    assert y.all()


def reset_peak() -> int:
    """Make the peak of this process' memory what it takes now, and return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_bytes("VmRSS")


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
