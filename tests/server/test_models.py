# SPDX-License-Identifier: Apache-2.0
"""Loading, replacing and unloading models of a running server, end to end."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

from conftest import StartServer
from support.models import add, constant, identity, model, slow, tensor, write
from support.server import RunningServer, running_server
from thirdrail import Client
from thirdrail.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ThirdrailError,
)
from thirdrail.models import LoadProgress

A = np.zeros((1, 4), np.float32)
EXPLICIT = ("--model-control=explicit", "--load-model=*")
POLL = ("--model-control=poll", "--poll-interval=0.2")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write(folder, "plus", add(1))
    write(folder, "other", identity())
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """In explicit mode, for tests that spare its processes; its models are theirs to change."""
    folder = tmp_path_factory.mktemp("models")
    write(folder, "plus", add(1))
    with running_server(folder, tmp_path_factory.mktemp("server"), EXPLICIT) as running:
        yield running


@pytest.fixture
def controlled(shared: RunningServer) -> RunningServer:
    """The same as it was: its socket its owner's, the model `plus`, and nothing else."""
    shared.socket.parent.chmod(0o700)
    shared.socket.chmod(0o600)
    with client_of(shared) as client:
        for name in {each.name for each in client.models()} - {"plus"}:
            client.unload(name)
            shutil.rmtree(shared.repository / name, ignore_errors=True)
        write(shared.repository, "plus", add(1))
        client.load("plus")
    return shared


@contextlib.contextmanager
def client_of(server: RunningServer, *, tcp: bool = False) -> Iterator[Client]:
    with Client(server.address if tcp else server.url) as client:
        yield client


def value_of(client: Client, version: int = 0) -> int:
    """What the model `plus` adds."""
    return int(client.infer("plus", {"a": A}, version=version)["c"][0, 0])


def state_of(client: Client, name: str) -> str:
    return ", ".join(each.state for each in client.models() if each.name == name)


def reason_of(client: Client, name: str) -> str:
    return next(each.reason for each in client.models() if each.name == name)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def warmed_up(count: int) -> str:
    """A configuration whose warm-up runs the slow model's loop `count` times."""
    return (
        f'model_warmup {{ name: "long" count: {count}'
        ' inputs { key: "x" value { data_type: TYPE_FP32 dims: 1 zero_data: true } }'
        ' inputs { key: "turns" value { data_type: TYPE_INT64 input_data_file: "turns" } } }'
    )


def write_slow_to_load(repository: Path, name: str, turns: int) -> None:
    write(repository, name, slow(), warmed_up(1))
    (repository / name / "warmup").mkdir()
    (repository / name / "warmup" / "turns").write_bytes(np.array(turns).tobytes())


# On demand


def test_a_load_tells_its_progress(controlled: RunningServer) -> None:
    with client_of(controlled) as client:
        client.unload("plus")
        assert state_of(client, "plus") == "unavailable"
        with pytest.raises(NotFound, match="'plus' has no available versions"):
            value_of(client)
        with pytest.raises(NotFound, match="'plus' has no available versions"):
            client.infer("plus", [1.0])  # for which the model's declaration is needed
        progress: list[LoadProgress] = []
        assert client.load("plus", progress=progress.append) == [1]
        phases = [each.phase for each in progress]
        assert phases == ["reading", "building", "warming up", "ready"]
        assert [each.step for each in progress] == sorted(each.step for each in progress)
        assert (progress[-1].step, progress[-1].steps) == (3, 3)
        assert value_of(client) == 1
        client.unload("plus")
        assert (state_of(client, "plus"), reason_of(client, "plus")) == ("unavailable", "unloaded")
        with pytest.raises(NotFound, match="'plus' has no available versions"):
            value_of(client)
        client.unload("plus")  # it is not loaded: that is how it stays


def test_a_given_configuration_is_used_for_that_load(controlled: RunningServer) -> None:
    with client_of(controlled) as client:
        client.load("plus", config_pbtxt="max_batch_size: 2")
        assert client.describe("plus").batch_rows_max == 2
        client.load("plus")
        assert client.describe("plus").batch_rows_max == 0


def test_what_cannot_be_loaded_says_why(controlled: RunningServer) -> None:
    with client_of(controlled) as client:
        with pytest.raises(NotFound, match="the repository has no folder 'none'"):
            client.load("none")
        with pytest.raises(NotFound, match=r"has no folder '\.\./models'"):
            client.load("../models")
        write(controlled.repository, "text", identity())
        (controlled.repository / "text" / "1" / "model.onnx").write_text("no model")
        with pytest.raises(Internal, match="failed to load 'text', no version is available"):
            client.load("text")
        assert state_of(client, "text") == "unavailable"
        with pytest.raises(ThirdrailError, match="config_pbtxt"):
            client.load("plus", config_pbtxt="no: field")
        assert value_of(client) == 1


class Callers:
    """Threads that call the model `plus` one request after the other."""

    def __init__(self, server: RunningServer, count: int) -> None:
        self.values: list[list[int]] = [[] for _ in range(count)]
        self.errors: list[ThirdrailError] = []
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(server, values)) for values in self.values
        ]

    def _call(self, server: RunningServer, values: list[int]) -> None:
        with client_of(server) as client:
            while not self._is_over.is_set():
                try:
                    values.append(value_of(client))
                except ThirdrailError as error:
                    self.errors.append(error)

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        until(lambda: all(self.values))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def test_a_reload_swaps_under_load_and_no_request_fails(controlled: RunningServer) -> None:
    with client_of(controlled) as client, Callers(controlled, 4) as callers:
        for value in range(2, 8):
            write(controlled.repository, "plus", add(value))
            client.load("plus")
            assert value_of(client) == value, "whoever comes after the load meets the new one"
        until(lambda: all(values[-1] == 7 for values in callers.values))
    assert callers.errors == []
    for values in callers.values:
        assert values == sorted(values), "nobody meets the old one after the new one"
        assert {1, 7} <= set(values)


def test_requests_in_flight_finish_on_their_version(controlled: RunningServer) -> None:
    inputs = {"x": np.zeros(1, np.float32), "turns": np.array(1)}

    def overtakes(client: Client, version: int, turns: int) -> bool:
        """Whether the next version is loaded and answers while the one before it runs."""
        old = client.submit("slow", {**inputs, "turns": np.array(turns)})
        waiting = client.submit("slow", inputs)
        until(lambda: old.done() or _running(client, "slow") == 1)
        write(controlled.repository, "slow", slow(), version=version + 1)
        client.load("slow")
        new = client.infer("slow", inputs)
        is_overtaken = not old.done()
        assert (new.model_version, old.result().model_version) == (version + 1, version)
        assert waiting.result().model_version == version
        return is_overtaken

    write(controlled.repository, "slow", slow(), version=1)
    with client_of(controlled) as client:
        client.load("slow")
        # The second where the first was over before, as on a busy machine.
        is_overtaken = overtakes(client, 1, 200_000) or overtakes(client, 2, 4_000_000)
        assert is_overtaken, "the load waits for nobody"


def _running(client: Client, name: str) -> int:
    return sum(each.running for each in client.snapshot().models if each.name == name)


def test_unload_lets_requests_in_flight_finish(controlled: RunningServer) -> None:
    write(controlled.repository, "slow", slow())
    with client_of(controlled) as client:
        client.load("slow")
        inputs = {"x": np.zeros(1, np.float32), "turns": np.array(200_000)}
        running = client.submit("slow", inputs)
        until(lambda: running.done() or _running(client, "slow") == 1)
        client.unload("slow")
        assert _running(client, "slow") == 0, "unload ends when the last request has"
        assert running.result().model_version == 1
        assert not client.health("slow")


def test_a_failed_reload_leaves_the_old_one_serving(controlled: RunningServer) -> None:
    with client_of(controlled) as client, Callers(controlled, 2) as callers:
        (controlled.repository / "plus" / "1" / "model.onnx").write_bytes(
            b"\x08\x09" + os.urandom(500)
        )
        with pytest.raises(Internal, match="failed to load 'plus'"):
            client.load("plus")
        assert state_of(client, "plus") == "ready"
        assert client.health()
        assert any("failed" in warning for warning in client.describe("plus").warnings)
        shutil.rmtree(controlled.repository / "plus")
        with pytest.raises(NotFound, match="the repository has no folder 'plus'"):
            client.load("plus")
        assert value_of(client) == 1
    assert callers.errors == []


# Who may


@pytest.mark.parametrize(("mode", "words"), [("none", "is off"), ("poll", "polling is enabled")])
def test_other_modes_load_nothing_on_demand(
    repository: Path, start_server: StartServer, mode: str, words: str
) -> None:
    with client_of(start_server(repository, f"--model-control={mode}")) as client:
        for control in (client.load, client.unload):
            with pytest.raises(FailedPrecondition, match=words):
                control("plus")
        assert value_of(client) == 1


def test_plain_tcp_controls_nothing(controlled: RunningServer) -> None:
    with client_of(controlled, tcp=True) as client:
        for control in (client.load, client.unload):
            with pytest.raises(PermissionDenied, match="client certificate"):
                control("plus")
        assert value_of(client) == 1


def test_a_socket_that_others_may_use_controls_nothing(controlled: RunningServer) -> None:
    controlled.socket.parent.chmod(0o755)
    controlled.socket.chmod(0o666)
    with client_of(controlled) as client:
        with pytest.raises(PermissionDenied, match="chmod 700"):
            client.load("plus")
        assert value_of(client) == 1


# Versions


POLICIES = {
    "highest": ("", [10]),
    "latest": ("version_policy { latest { num_versions: 2 } }", [9, 10]),
    "all": ("version_policy { all {} }", [2, 9, 10]),
    "specific": ("version_policy { specific { versions: [2, 9] } }", [2, 9]),
}


def test_the_version_policy_chooses(repository: Path, start_server: StartServer) -> None:
    for name, (policy, _) in POLICIES.items():
        for version in (2, 9, 10):
            write(repository, name, add(version), policy, version)
    with client_of(start_server(repository)) as client:
        for name, (_, versions) in POLICIES.items():
            assert [each.version for each in client.models() if each.name == name] == versions
            for version in versions:
                answer = client.infer(name, {"a": A}, version=version)
                assert (answer.model_version, int(answer["c"][0, 0])) == (version, version)
            assert client.infer(name, {"a": A}).model_version == max(versions)
            for version in {2, 9, 10} - set(versions):
                with pytest.raises(NotFound, match=f"'{name}' version {version} is not found"):
                    client.infer(name, {"a": A}, version=version)


# Following the files


def test_polling_follows_the_files(repository: Path, start_server: StartServer) -> None:
    with client_of(start_server(repository, *POLL)) as client:
        write(repository, "plus", add(2))
        until(lambda: value_of(client) == 2)
        write(repository, "late", identity())
        until(lambda: state_of(client, "late") == "ready")
        shutil.rmtree(repository / "late")
        until(lambda: not state_of(client, "late"))
        write(repository, "plus", add(3), version=2)
        until(lambda: value_of(client) == 3)
        assert client.health()


@pytest.mark.slow
def test_polling_leaves_half_written_files_alone(
    repository: Path, start_server: StartServer
) -> None:
    """A file that grows at every look is no model yet, and no broken one either."""
    server = start_server(repository, "--model-control=poll", "--poll-interval=2")
    with client_of(server) as client:
        whole = identity().SerializeToString()
        target = repository / "growing" / "1" / "model.onnx"
        target.parent.mkdir(parents=True)
        with target.open("wb", buffering=0) as file:
            for byte in range(60):  # 6 s; it stands still for 2 s only where everything does
                file.write(whole[byte : byte + 1])
                time.sleep(0.1)
                assert state_of(client, "growing") in ("", "loading")
            file.write(whole[60:])
        until(lambda: state_of(client, "growing") == "ready")
    assert "failed to load 'growing'" not in server.log_text()


@pytest.mark.slow
def test_polling_keeps_the_old_one_when_the_new_one_is_broken(
    repository: Path, start_server: StartServer
) -> None:
    server = start_server(repository, *POLL)
    with client_of(server) as client:
        (repository / "plus" / "1" / "model.onnx").write_bytes(b"broken")
        until(lambda: "failed to load 'plus'" in server.log_text())
        assert (value_of(client), state_of(client, "plus")) == (1, "ready")
        write(repository, "plus", add(4))
        until(lambda: value_of(client) == 4)


# Deaths and memory


def test_a_model_whose_load_costs_the_worker_its_life_is_not_loaded_again(
    repository: Path, start_server: StartServer
) -> None:
    server = start_server(repository, *EXPLICIT)
    write_slow_to_load(repository, "deadly", turns=10_000_000)
    with client_of(server) as client:
        failures: list[ThirdrailError] = []

        def load() -> None:
            try:
                client.load("deadly")
            except ThirdrailError as error:
                failures.append(error)

        loading = threading.Thread(target=load)
        loading.start()
        until(lambda: state_of(client, "deadly") == "loading")
        assert value_of(client) == 1, "a load is beside the requests"
        os.kill(server.worker_pid(), signal.SIGKILL)
        loading.join()
        assert "worker died while loading it: signal 9 (SIGKILL)" in str(failures[0])
        until(lambda: _serve(client, "plus", "other"))
        assert value_of(client) == 1
        assert state_of(client, "deadly") == "unavailable"
        assert "worker died while loading it" in reason_of(client, "deadly")
        assert client.snapshot().workers[0].restarts == 1


@pytest.mark.slow
def test_a_startup_model_that_kills_the_worker_is_given_up(
    repository: Path, start_server: StartServer
) -> None:
    write_slow_to_load(repository, "deadly", turns=10_000_000)
    server = start_server(repository, wait=False)
    until(server.socket.exists)
    with client_of(server) as client:
        until(lambda: state_of(client, "deadly") == "loading" and _serve(client, "plus", "other"))
        os.kill(server.worker_pid(), signal.SIGKILL)
        until(lambda: state_of(client, "deadly") == "unavailable")
        until(lambda: _serve(client, "plus", "other"))
        assert value_of(client) == 1
        assert not client.health(), "ready only when every startup model is"
        assert client.snapshot().workers[0].restarts == 1


def _serve(client: Client, *names: str) -> bool:
    return all(client.health(name) for name in names)


def _resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def weighty(megabytes: int) -> onnx.ModelProto:
    """c = a + b, where b are weights of so many megabytes."""
    shape = ("n", megabytes * 250_000)
    weights = constant("b", np.ones(shape[1], np.float32))
    node = helper.make_node("Add", ["a", "b"], ["c"])
    return model([node], [tensor("a", "FP32", shape)], [tensor("c", "FP32", shape)], [weights])


@pytest.mark.slow
def test_twenty_loads_and_unloads_leave_no_memory_behind(
    repository: Path, start_server: StartServer
) -> None:
    write(repository, "heavy", weighty(megabytes=16))
    server = start_server(repository, *EXPLICIT)
    with client_of(server) as client:

        def cycle(*names: str) -> None:
            for name in names:
                client.unload(name)
                client.load(name)

        cycle(*("plus", "heavy") * 3)
        before = _resident(server.worker_pid()), _resident(server.pid)
        cycle(*("plus", "heavy") * 10)
        after = _resident(server.worker_pid()), _resident(server.pid)
        assert value_of(client) == 1
    assert after[0] - before[0] < 10 << 20
    assert after[1] - before[1] < 10 << 20
