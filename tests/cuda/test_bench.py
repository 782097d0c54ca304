# SPDX-License-Identifier: Apache-2.0
"""`python -m bench gpu` runs on the twin, and says why it does not without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from thirdrail_engines.host import cuda_devices

ROOT = Path(__file__).parent.parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_all_of_it_runs_on_the_twin() -> None:
    done = bench("--twin", "--seconds", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    for size in ("64 B", "4 KiB", "32 KiB"):
        assert f"{size} there and back, twin of a GPU" in done.stdout
    assert done.stdout.count("device memory ") >= 3
    assert done.stdout.count("bare, ONNX Runtime on the twin") == 2


def test_without_a_gpu_it_says_so_in_a_line() -> None:
    if cuda_devices():
        pytest.skip("there is a GPU here")
    done = bench()
    assert done.returncode == 1
    assert done.stderr.startswith("bench gpu needs a GPU: ")
    assert done.stderr.endswith(". --twin runs its code without one\n")
    assert done.stderr.count("\n") == 1
