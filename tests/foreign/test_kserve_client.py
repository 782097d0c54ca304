# SPDX-License-Identifier: Apache-2.0
"""KServe's Python client, and our own client in one process with it and with tritonclient."""

from collections.abc import Callable

import pytest

from support.environments import PythonEnvironment
from support.server import RunningServer

pytestmark = [pytest.mark.needs_packages, pytest.mark.timeout(600)]

RunProgram = Callable[..., str]

# tritonclient.grpc and kserve cannot be imported together at all, with or without us: each
# registers messages of its own under the names inference.*. Ours claim no such name.
ORDERS = [
    ("thirdrail", "tritonclient.grpc"),
    ("tritonclient.grpc", "thirdrail"),
    ("thirdrail", "kserve"),
    ("kserve", "thirdrail"),
    ("thirdrail", "tritonclient.utils", "kserve"),
    ("kserve", "tritonclient.utils", "thirdrail"),
]


def test_calls(
    server: RunningServer, kserve_environment: PythonEnvironment, run_program: RunProgram
) -> None:
    run_program(kserve_environment, "kserve_client", server.address)
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize("modules", ORDERS, ids=" ".join)
def test_side_by_side(
    modules: tuple[str, ...],
    server: RunningServer,
    kserve_environment: PythonEnvironment,
    run_program: RunProgram,
) -> None:
    output = run_program(
        kserve_environment, "side_by_side", server.address, *modules, with_client=True
    )
    assert output.split()[-len(modules) :] == list(modules)
