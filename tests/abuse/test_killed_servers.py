# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of the worker, and of the front, under load of several client processes."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from support.killable import Killable, killable, until
from support.load import LOADS, Report
from support.server import RunningServer, running_server, wait_until_settled

pytestmark = pytest.mark.slow  # services that were killed take long to start again

KILLS = 3


@pytest.fixture
def mortal(abused_repository: Path, start_server: StartServer) -> RunningServer:
    return start_server(abused_repository)


@contextlib.contextmanager
def under_load(server: RunningServer) -> Iterator[list[Killable]]:
    """Clients that call; on the lane, all of them."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(killable(load, server.url)) for load in LOADS]
        until_served(clients)
        yield clients


def reports(clients: list[Killable]) -> list[Report]:
    """Since they were asked last. Every call has ended with a result or as Unavailable."""
    for client in clients:
        client.pipe.send("report")
    answers: list[Report] = [client.hear() for client in clients]
    for answer in answers:
        assert not answer.others, answer.others
    return answers


def until_served(clients: list[Killable], transport: str = "lane") -> list[Report]:
    """Until each of them gets results over the lane. What they said meanwhile."""
    said: list[Report] = []
    waiting = list(clients)

    def all_served() -> bool:
        answers = reports(waiting)
        said.extend(answers)
        for client, answer in zip(list(waiting), answers, strict=True):
            if answer.transport == transport and answer.results and not answer.unavailable:
                waiting.remove(client)
        time.sleep(0.05)
        return not waiting

    until(all_served, lambda: said[-4:])
    return said


def test_clients_come_back_after_a_workers_death(mortal: RunningServer) -> None:
    with under_load(mortal) as clients:
        for _ in range(KILLS):
            worker = mortal.worker_pid()
            os.kill(worker, signal.SIGKILL)
            # First who was calling: what was served until now says nothing.
            until(lambda: any(each.unavailable for each in reports(clients)))
            until_served(clients)
            assert mortal.worker_pid() != worker
        for client in clients:
            assert client.ask("stop").others == []
    assert mortal.process.poll() is None
    assert "Traceback" not in mortal.log_text()


def test_a_worker_that_is_killed_while_clients_attach(mortal: RunningServer) -> None:
    """At once, before anybody has sent a request."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(killable(load, mortal.url)) for load in LOADS]
        os.kill(mortal.worker_pid(), signal.SIGKILL)
        until_served(clients)


def test_nothing_is_left_of_a_killed_front(abused_repository: Path, tmp_path: Path) -> None:
    """Not its worker, not its sockets; and clients find the next server by themselves."""
    with running_server(abused_repository, tmp_path) as server, under_load(server) as clients:
        folder = server.socket.parent
        worker = server.worker_pid()
        children = psutil.Process(server.pid).children(recursive=True)
        files = {path.name for path in folder.iterdir()}
        assert {"grpc.sock", "grpc.cpu.lane"} <= files
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        until(lambda: not any(is_there(child) for child in children))
        assert worker in [child.pid for child in children]
        assert [path.name for path in folder.iterdir() if path.is_socket()] == []
        until(lambda: all(each.results == 0 for each in reports(clients)))
        assert all(each.unavailable for each in reports(clients))
        assert not lane_memory_of(clients) & memory_of_others(clients)
        with running_server(abused_repository, tmp_path) as following:
            wait_until_settled(following)
            until_served(clients)
            for client in clients:
                assert client.ask("stop").others == []


def is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def lane_memory_of(clients: list[Killable]) -> set[str]:
    """Inodes of the lane's memory that these have mapped."""
    found: set[str] = set()
    for client in clients:
        found |= _memory(client.pid)
    return found


def memory_of_others(clients: list[Killable]) -> set[str]:
    ours = {client.pid for client in clients}
    found: set[str] = set()
    for pid in psutil.pids():
        if pid not in ours:
            found |= _memory(pid)
    return found


def _memory(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split()[4] for line in lines if "memfd:thirdrail" in line}
    return set()
