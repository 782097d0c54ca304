# SPDX-License-Identifier: Apache-2.0
"""Python on a driver made for the purpose (stub_driver.c), which keeps device memory on the host.

No GPU is needed and none is used. What a GPU does with it, tests/gpu asks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wall", f"-Wl,-soname,{library.name}"]
    source = HERE / "stub_driver.c"
    subprocess.run(["gcc", *options, "-o", library, source, "-ldl", "-lpthread"], check=True)
    return folder


def run_on_stub(folder: Path, *command: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, for which the stub is the driver."""
    variables = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "STUB_DEVICES": str(devices),
        "THIRDRAIL_TEST_DEVICE": "driver",
    }
    return subprocess.run(
        [sys.executable, *command],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE.parent.parent,
    )
