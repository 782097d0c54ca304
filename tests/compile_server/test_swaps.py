# SPDX-License-Identifier: Apache-2.0
"""Models that serve while their engine is built: the swap under load, and what may interrupt it.

A build is held by stopping its process, before it can have done anything.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest

from conftest import StartServer
from support.compiled import (
    builds_of,
    held_build,
    status_of,
    stopped_build,
    until_engine,
    until_ready,
    write_compiled,
)
from support.models import identity, write
from support.perceptrons import two_layers
from support.server import RunningServer
from thirdrail import Client
from thirdrail.errors import ThirdrailError, Unavailable
from thirdrail.tensors import Array
from thirdrail_server.config import CompileConfig, WorkerConfig

CALLERS = 4
PLAIN, PLAN = "onnxruntime", "onnxruntime plan"
LOADS_AT_ONCE_MAX = WorkerConfig().loads_at_once_max + CompileConfig().loads_at_once_max
QUICKLY_S = 30.0  # on any machine; these must not wait for a build that takes for ever


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    write_compiled(folder, "m", two_layers(), serve_while_compiling="true")
    return folder


@pytest.fixture
def server(repository: Path, tmp_path: Path, start_server: StartServer) -> RunningServer:
    cache = f"--cache-dir={tmp_path / 'cache'}"
    return start_server(repository, "--model-control=explicit", "--load-model=m", cache, wait=False)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


class Load:
    """Callers that never pause, and check every answer."""

    def __init__(self, url: str, session: onnxruntime.InferenceSession) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._url = url
        self._session = session
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CALLERS)]

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()

    def until_more(self, answers: int) -> None:
        """Wait until so many more came."""
        goal = self.answers + answers
        while self.answers < goal and not self.failures:
            time.sleep(0.01)

    def _call(self, number: int) -> None:
        x = np.random.default_rng(number).standard_normal((3, 16), dtype=np.float32)
        expected: list[Array] = self._session.run(["y", "z"], {"x": x})
        with Client(self._url) as client:
            while not self._is_over.is_set() and not self.failures:
                try:
                    found = client.infer("m", {"x": x})
                except ThirdrailError as error:
                    self.failures.append(repr(error))
                    return
                for name, values in zip(("y", "z"), expected, strict=True):
                    if not np.allclose(found[name], values, rtol=1e-4, atol=1e-4):
                        self.failures.append(f"{name} is {found[name]}, expected {values}")
                self.answers += 1


@pytest.mark.slow
def test_models_that_wait_for_their_engines_hold_up_no_other_load(
    tmp_path: Path, start_server: StartServer
) -> None:
    """More of them than there are threads or permits for loads."""
    folder = tmp_path / "repository"
    names = [f"m{number}" for number in range(LOADS_AT_ONCE_MAX + 4)]
    for name in names:
        write_compiled(folder, name, two_layers(), serve_while_compiling="true")
    write(folder, "plain", identity())
    wanted = [f"--load-model={name}" for name in names[:-1]]
    server = start_server(
        folder, "--model-control=explicit", f"--cache-dir={tmp_path / 'c'}", *wanted, wait=False
    )
    with Client(server.url) as client, held_build(server):
        for name in names[:-1]:
            until_ready(client, name)
        started = time.monotonic()
        client.load(names[-1])
        client.load("plain")
        assert time.monotonic() - started < QUICKLY_S


def test_requests_are_answered_while_the_engine_is_built_and_when_it_takes_over(
    server: RunningServer, client: Client, repository: Path
) -> None:
    session = onnxruntime.InferenceSession(repository / "m/1/model.onnx")
    with held_build(server):
        until_ready(client, "m")
        status = status_of(client, "m")
        assert status.engine == PLAIN
        assert status.engine_reason.startswith(f"{PLAN}: compiling: ")
        assert status.load_phase
        load = Load(server.url, session)
        stack = contextlib.ExitStack()
        stack.enter_context(load.running())
        load.until_more(200)
        # As long as nothing is built, nothing else can have answered.
        assert status_of(client, "m").engine == PLAIN
        assert not list((repository.parent / "cache" / "plans").iterdir())
    with stack:
        status = until_engine(client, "m", PLAN)
        load.until_more(200)
    assert load.failures == []
    assert status.engine_reason == ""
    report = client.describe("m").engine_report
    assert report.proofs
    assert not report.is_cache_hit
    metrics = client.metrics()
    assert 'thirdrail_engine_fallbacks_total{model="m",version="1"} 0.0' in metrics
    assert 'thirdrail_requests_total{model="m",outcome="failed",version="1"} 0.0' in metrics
    assert f"model 'm' version 1 is run by {PLAN} from now on" in server.log_text()


@pytest.mark.slow
def test_a_plan_that_is_there_needs_no_stopgap(server: RunningServer, client: Client) -> None:
    until_engine(client, "m", PLAN)
    with_plan = server.log_text().count("is run by onnxruntime, not by onnxruntime plan: compiling")
    client.load("m")
    assert status_of(client, "m").engine == PLAN
    assert client.describe("m").engine_report.is_cache_hit
    assert server.log_text().count("not by onnxruntime plan: compiling") == with_plan == 1


@pytest.mark.slow
def test_an_unload_ends_the_build(server: RunningServer, client: Client) -> None:
    with held_build(server) as build:
        until_ready(client, "m")
        began_s = time.monotonic()
        client.unload("m")
        assert time.monotonic() - began_s < QUICKLY_S
        until_gone(build)
    status = status_of(client, "m")
    assert (status.state, status.reason, status.load_phase) == ("unavailable", "unloaded", "")


@pytest.mark.slow
def test_another_load_ends_the_build_and_begins_its_own(
    server: RunningServer, client: Client, repository: Path
) -> None:
    with held_build(server) as first:
        until_ready(client, "m")
        write_compiled(repository, "m", two_layers(seed=1), serve_while_compiling="true")
        client.load("m")
        until_gone(first)
    until_engine(client, "m", PLAN)


@pytest.mark.slow
def test_the_server_stops_while_something_is_built(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    build = stopped_build(server)
    until_ready(client, "m")
    client.close()
    began_s = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began_s < QUICKLY_S
    until_gone(build)
    assert not list((tmp_path / "cache" / "work").iterdir())


@pytest.mark.slow
def test_a_worker_that_dies_during_a_build_comes_back_and_builds_again(
    server: RunningServer, client: Client
) -> None:
    with held_build(server) as build:
        until_ready(client, "m")
        os.kill(server.worker_pid(), signal.SIGKILL)
    until_gone(build)  # stopped, it could not see who died
    until_engine(client, "m", PLAN)
    assert "worker died while loading" not in server.log_text()


@pytest.mark.slow
def test_a_load_that_waits_for_its_build_can_be_cancelled(
    server: RunningServer, client: Client, repository: Path
) -> None:
    until_engine(client, "m", PLAN)
    write_compiled(repository, "cold", two_layers(seed=2))
    errors: list[Exception] = []

    def load() -> None:
        try:
            client.load("cold")
        except ThirdrailError as error:
            errors.append(error)

    loading = threading.Thread(target=load)
    loading.start()
    with held_build(server) as build:
        assert status_of(client, "cold").load_phase
        client.unload("cold")
        loading.join(QUICKLY_S)
        until_gone(build)
    assert "the model was unloaded meanwhile" in str(errors[0])
    assert status_of(client, "cold").state == "unavailable"
    assert not isinstance(errors[0], Unavailable)


@pytest.mark.slow
def test_a_worker_that_dies_is_not_the_fault_of_who_waits_for_a_build(
    server: RunningServer, client: Client, repository: Path
) -> None:
    until_engine(client, "m", PLAN)
    write_compiled(repository, "cold", two_layers(seed=3))
    loading = threading.Thread(target=lambda: client.load("cold"))
    loading.start()
    with held_build(server):
        os.kill(server.worker_pid(), signal.SIGKILL)
    loading.join()
    assert status_of(client, "cold").engine == PLAN
    assert builds_of(server) == []


def until_gone(process: psutil.Process) -> None:
    """Or a zombie: nobody has to bury the children of a worker that was killed."""
    ends_s = time.monotonic() + QUICKLY_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < ends_s, f"{process} still runs"
            time.sleep(0.01)
