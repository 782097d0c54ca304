# SPDX-License-Identifier: Apache-2.0
"""For all tests: fixtures, coroutine tests, the rule that `--all` turns a skip into a failure."""

import asyncio
import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from support.models import write_standard_repository
from support.server import RunningServer, running_server

NEEDS_ALL = (
    "slow",
    "needs_cuda_bindings",
    "needs_gcc",
    "needs_node",
    "needs_packages",
    "needs_tensorrt",
    "needs_torch",
)

StartServer = Callable[..., RunningServer]

# How long an example takes, or is drawn, says something of what else runs on the machine.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="run the slow tests and those that install compilers or other people's packages; "
        "a skip is then a failure, except in tests/gpu",
    )
    parser.addoption(
        "--rest",
        action="store_true",
        help="of --all, only the tests that do not run without it",
    )


def pytest_configure() -> None:
    # A shell's background job ignores SIGINT, and so would every program that its tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def runs_all(config: pytest.Config) -> bool:
    return bool(config.getoption("--all") or config.getoption("--rest"))


def needs(item: pytest.Item) -> list[str]:
    """What keeps a test out of `make test`."""
    return [name for name in NEEDS_ALL if item.get_closest_marker(name)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--rest"):
        config.hook.pytest_deselected(items=[item for item in items if not needs(item)])
        items[:] = [item for item in items if needs(item)]
    elif not runs_all(config):
        for item in items:
            if names := needs(item):
                reason = f"{', '.join(names)}: runs with make test-all"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    is_gpu = "gpu" in item.path.parts
    if report.skipped and runs_all(item.config) and not is_gpu:  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
        report.longrepr = f"skipped under --all: {report.longrepr}"  # type: ignore[attr-defined]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A coroutine test runs on a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def standard_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of support.models.write_standard_repository. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("repository")
    write_standard_repository(folder)
    return folder


@pytest.fixture(scope="session")
def server(
    standard_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for all tests that leave it as it was: no killing, no loading."""
    with running_server(standard_repository, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server(repository, *arguments, wait=True): a server of the test's own."""
    with ExitStack() as stack:

        def start(repository: Path, *arguments: str, wait: bool = True) -> RunningServer:
            folder = tmp_path_factory.mktemp("server")
            return stack.enter_context(running_server(repository, folder, arguments, wait=wait))

        yield start
