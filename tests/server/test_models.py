# SPDX-License-Identifier: Apache-2.0
"""Loading, replacing and unloading models of a running server on demand, end to end."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import StartServer
from server.controlled import EXPLICIT, A, client_of, reason_of, state_of, until, value_of
from support.models import add, identity, slow, write
from support.server import RunningServer, running_server
from thirdrail import Client
from thirdrail.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ThirdrailError,
    Unavailable,
)
from thirdrail.models import LoadProgress
from thirdrail.transport import TransportChoice

TRANSPORTS: tuple[TransportChoice, ...] = ("grpc", "lane")


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


@pytest.mark.parametrize("a", [A, [[0.0] * 4]], ids=["array", "list that needs the declaration"])
def test_a_version_that_failed_beside_others_is_told_alike_over_lane_and_grpc(
    controlled: RunningServer, a: Any
) -> None:
    write(controlled.repository, "both", add(1), "version_policy { all {} }")
    write(controlled.repository, "both", add(2), version=2)
    (controlled.repository / "both" / "2" / "model.onnx").write_text("no model")
    with client_of(controlled) as client:
        assert client.load("both") == [1]
    told: set[str] = set()
    for transport in TRANSPORTS:
        with Client(controlled.url, transport=transport) as client:
            with pytest.raises(Unavailable, match=r"'both' version 2 is not .*onnx") as raised:
                client.infer("both", {"a": a}, version=2)
            told.add(str(raised.value))
    assert len(told) == 1


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


@pytest.mark.slow
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
