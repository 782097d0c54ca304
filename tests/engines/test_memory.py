# SPDX-License-Identifier: Apache-2.0
"""Loading and closing again and again leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

LEFT_OVER_BYTES_MAX = 10 << 20
CYCLES = 20


def test_twenty_loads_end_where_they_began(write_model: Callable[..., Path]) -> None:
    """In a process of its own: what other tests freed would be counted otherwise."""
    path = write_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 1024])},
        {"y": (TensorProto.FLOAT, ["n", 1024])},
        {"w": np.random.default_rng(0).standard_normal((1024, 1024), np.float32)},
    )
    script = Path(__file__).with_name("load_cycles.py")
    output = subprocess.run(
        [sys.executable, script, path, str(CYCLES)], check=True, capture_output=True
    ).stdout
    grown = json.loads(output)
    # An engine that stayed would be 4 MiB of weights and a thread, twenty of them 80 MiB.
    assert grown["grown_bytes"] < LEFT_OVER_BYTES_MAX
    assert grown["grown_threads"] < CYCLES / 2  # one that just ended may still be listed
