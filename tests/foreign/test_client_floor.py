# SPDX-License-Identifier: Apache-2.0
"""Our client with the oldest dependencies that pyproject.toml allows."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support.environments import PythonEnvironment, client_dependencies, requirements_in
from support.server import RunningServer

RunProgram = Callable[..., str]

REQUIREMENTS = Path(__file__).parent / "requirements" / "client_floor.txt"


def test_the_pins_are_the_floors_that_are_promised() -> None:
    pins = dict(line.split("==") for line in requirements_in(REQUIREMENTS))
    floors = dict(dependency.split(">=") for dependency in client_dependencies())
    assert pins.keys() == floors.keys()
    for name, floor in floors.items():
        assert re.match(rf"{re.escape(floor)}(\.|$)", pins[name]), (name, floor, pins[name])


@pytest.mark.needs_packages
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_every_kind_of_call(
    transport: str,
    server: RunningServer,
    floor_environment: PythonEnvironment,
    run_program: RunProgram,
) -> None:
    url = server.address if transport == "tcp" else server.url
    run_program(floor_environment, "client_at_floor", url, with_client=True)
