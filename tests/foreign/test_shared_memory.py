# SPDX-License-Identifier: Apache-2.0
"""Shared memory as tritonclient makes it, unmodified, against a server that allows it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.environments import PythonEnvironment
from support.server import RunningServer

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]


@pytest.mark.parametrize("over", ["address", "url"])
@pytest.mark.parametrize("flag", ["--allow-client-shm", "--allow-client-shm=true"])
def test_tritonclient(
    start_server: Callable[..., RunningServer],
    standard_repository: Path,
    tritonclient_environment: PythonEnvironment,
    run_program: Callable[..., str],
    over: str,
    flag: str,
) -> None:
    server = start_server(standard_repository, flag)
    url = getattr(server, over)
    run_program(tritonclient_environment, "tritonclient_shared_memory", url)
    assert "Traceback" not in server.log_text()
