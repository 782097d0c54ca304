# SPDX-License-Identifier: Apache-2.0
"""Loading and closing again and again leaves nothing behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from thirdrail_engines import EngineOptions, Inspector, load

LEFT_OVER_BYTES_MAX = 10 << 20
CYCLES = 20


def test_twenty_loads_end_where_they_began(
    write_model: Callable[..., Path], inspector: Inspector
) -> None:
    weights = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    path = write_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 1024])},
        {"y": (TensorProto.FLOAT, ["n", 1024])},
        {"w": weights},
    )
    x = np.ones((64, 1024), np.float32)

    def cycle() -> None:
        engine = load(path, options=EngineOptions(threads_max=2), inspector=inspector)
        engine.run({"x": x}, ["y"], {})
        engine.close()

    for _ in range(2):  # code and pools that stay are touched once
        in_thread(cycle)
    before, threads = resident_bytes(), thread_count()
    for _ in range(CYCLES):
        in_thread(cycle)
    # One engine that stayed would be 4 MiB of weights, twenty of them 80.
    assert resident_bytes() - before < LEFT_OVER_BYTES_MAX
    assert thread_count() <= threads


def in_thread(work: Callable[[], None]) -> None:
    """As a server loads: each time in another thread, with another piece of malloc's memory."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
