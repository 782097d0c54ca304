# SPDX-License-Identifier: Apache-2.0
"""Versions, files that are followed, and what a load may cost, on a running server."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper

from conftest import StartServer
from server.controlled import (
    EXPLICIT,
    POLL,
    A,
    client_of,
    reason_of,
    state_of,
    until,
    value_of,
    write_slow_to_load,
)
from support.models import add, constant, identity, model, tensor, write
from thirdrail import Client
from thirdrail.aio import AsyncClient
from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError
from thirdrail.transport import TransportChoice


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    write(folder, "plus", add(1))
    write(folder, "other", identity())
    return folder


# Versions


POLICIES = {
    "highest": ("", [10]),
    "latest": ("version_policy { latest { num_versions: 2 } }", [9, 10]),
    "all": ("version_policy { all {} }", [2, 9, 10]),
    "specific": ("version_policy { specific { versions: [2, 9] } }", [2, 9]),
}


@pytest.mark.slow
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


@pytest.mark.slow
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


# What callers know of models


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["lane", "grpc"])
async def test_a_reload_by_somebody_else_is_seen_at_once(
    repository: Path, start_server: StartServer, transport: TransportChoice
) -> None:
    """Lists are sent as what the model declares, which a client remembers for a while."""
    url = start_server(repository, *EXPLICIT).url
    clients = Client(url, transport=transport), AsyncClient(url, transport=transport)
    with clients[0] as client, Client(url) as somebody_else:
        async with clients[1] as aio:
            for dtype, numpy in (("FP32", np.float32), ("INT64", np.int64)):
                write(repository, "other", identity(dtype))
                somebody_else.load("other")
                assert client.infer("other", {"x": [1, 2]})["y"].dtype == numpy
                assert (await aio.infer("other", {"x": [1, 2]}))["y"].dtype == numpy
            with pytest.raises(InvalidArgument, match="unexpected shape"):
                client.infer("other", {"x": [[1, 2]]})
