# SPDX-License-Identifier: Apache-2.0
"""CUDA shared memory by tritonclient, unmodified, with a twin in the place of a GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.cuda_regions import DeviceMemory
from support.environments import PythonEnvironment
from support.models import add, write
from support.server import running_server

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]


def test_tritonclient(
    tmp_path: Path,
    tritonclient_environment: PythonEnvironment,
    run_program: Callable[..., str],
) -> None:
    write(tmp_path / "models", "add_one", add(1))
    x = np.arange(8, dtype=np.float32)
    with (
        running_server(
            tmp_path / "models", tmp_path, ["--allow-client-shm"], module="support.twin_gpu_server"
        ) as server,
        DeviceMemory(4096) as memory,
    ):
        memory.write(x.tobytes())
        said = run_program(
            tritonclient_environment,
            "tritonclient_cuda_memory",
            server.address,
            memory.handle.hex(),
        )
        assert said.endswith("passed\n")
        assert memory.read(32, 2048) == (x + 1).tobytes()
        assert "Traceback" not in server.log_text()
