# SPDX-License-Identifier: Apache-2.0
"""Other people's clients, each in an environment of its own, and how a test runs one.

The pins are in `requirements/`, with everything that comes along, so that a run is repeatable and
pip has nothing to search for. The programs in `programs/` run there, without our packages.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.environments import (
    REPOSITORY_ROOT,
    PythonEnvironment,
    client_dependencies,
    python_environment,
    requirements_in,
    run,
)

TESTS = REPOSITORY_ROOT / "tests"
CLIENT = REPOSITORY_ROOT / "client"
REQUIREMENTS = TESTS / "foreign" / "requirements"

# run_program(environment, program, *arguments, with_client=False, **variables): its output.
RunProgram = Callable[..., str]


@pytest.fixture(scope="session")
def tritonclient_environment() -> PythonEnvironment:
    return python_environment("tritonclient", requirements_in(REQUIREMENTS / "tritonclient.txt"))


@pytest.fixture(scope="session")
def kserve_environment() -> PythonEnvironment:
    """kserve, tritonclient without its grpc extra, and what our client asks for.

    That pip finds versions for all three together is part of the test.
    """
    pins = requirements_in(REQUIREMENTS / "kserve.txt")
    return python_environment("kserve", [*pins, *client_dependencies()])


@pytest.fixture(scope="session")
def floor_environment() -> PythonEnvironment:
    return python_environment("client-floor", requirements_in(REQUIREMENTS / "client_floor.txt"))


@pytest.fixture(scope="session")
def run_program() -> RunProgram:
    def run_one(
        environment: PythonEnvironment,
        program: str,
        *arguments: str,
        with_client: bool = False,
        **variables: str | Path,
    ) -> str:
        paths = [TESTS, CLIENT] if with_client else [TESTS]
        variables |= {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [str(environment.python), "-m", f"foreign.programs.{program}", *arguments]
        done = run(command, {name: str(value) for name, value in variables.items()})
        print(done.stdout)
        assert done.returncode == 0, f"{program} failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run_one
