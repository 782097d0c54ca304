# SPDX-License-Identifier: Apache-2.0
"""Clients that die, hang up or say goodbye: when all of their memory comes back."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from support.lane_child import LARGE
from support.lane_peer import LanePeer, Request, by_ref, infer
from support.worker import RunningWorker, running_worker
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import lane_pb2
from thirdrail.v1.sessions_pb2 import (
    SESSION_STATE_ACTIVE,
    SESSION_STATE_DRAINING,
    SESSION_STATE_QUARANTINE,
    SessionInfo,
)
from thirdrail_server.config import SessionLimits, WorkerConfig

TESTS = Path(__file__).parent.parent
UNTIL_S_MAX = 60
QUARANTINE_MS = 50


@pytest.fixture(scope="module")
def worker(
    standard_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    path = tmp_path_factory.mktemp("lane") / "cpu.lane"
    config = WorkerConfig(sessions=SessionLimits(quarantine_ms=QUARANTINE_MS))
    with running_worker(config, listen=path) as running:
        running.load(standard_repository, "identity_fp32", "slow")
        running.attach()  # as the front
        yield running


Footprint = tuple[int, int, int, int, int]


def footprint(worker: RunningWorker) -> Footprint:
    """Sessions, descriptors, mappings, bytes and leases."""
    status = worker.status()
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    return (
        status.sessions,
        worker.fd_count(),
        maps.count("memfd:thirdrail"),
        status.arena_bytes,
        status.leases,
    )


def until(is_so: Callable[[], bool], what: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + UNTIL_S_MAX
    while not is_so():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


@pytest.fixture
def baseline(worker: RunningWorker) -> Iterator[Footprint]:
    """What there is before; and afterwards there is no more."""
    before = footprint(worker)
    yield before
    until(lambda: is_within(footprint(worker), before), lambda: (footprint(worker), before))


def is_within(now: Footprint, before: Footprint) -> bool:
    """Fewer descriptors are fine: what loaded the models hangs up after a while."""
    return all(a <= b for a, b in zip(now, before, strict=True))


@contextlib.contextmanager
def child(worker: RunningWorker, what: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A client process, and the numbers that it said."""
    opened = worker.open_session()
    command = [sys.executable, "-m", "support.lane_child"]
    command += [str(worker.lane_path), opened.token.hex(), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS)
    assert process.stdout is not None
    try:
        ready, *numbers = process.stdout.readline().split()
        assert ready == "ready"
        yield process, [int(number) for number in numbers]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def session(worker: RunningWorker, number: int) -> SessionInfo | None:
    return worker.sessions().get(number)


@pytest.mark.parametrize("what", ["silent", "idle", "holding"])
def test_a_killed_client_leaves_nothing(
    worker: RunningWorker, baseline: Footprint, what: str
) -> None:
    with child(worker, what) as (process, _):
        until(lambda: footprint(worker)[0] > baseline[0])  # it is in the line before it is taken
        process.kill()
        until(lambda: is_within(footprint(worker), baseline))


def test_a_forked_child_does_not_hide_the_death(worker: RunningWorker, baseline: Footprint) -> None:
    with child(worker, "forked") as (process, (number, grandchild)):
        try:
            info = session(worker, number)
            assert info is not None
            assert (info.pid, info.leases, info.state) == (process.pid, 1, SESSION_STATE_ACTIVE)
            process.kill()
            process.wait()
            until(lambda: is_within(footprint(worker), baseline))
            os.kill(grandchild, 0)  # and still has the socket
        finally:
            os.kill(grandchild, signal.SIGKILL)


def hold(worker: RunningWorker) -> LanePeer:
    """A session of this process, which lives on, with both kinds of memory and a lease."""
    peer = worker.peer()
    peer.answer(by_ref(1, peer.place(peer.grow(LARGE.nbytes), LARGE)))
    return peer


@pytest.mark.usefixtures("baseline")
def test_memory_comes_back_with_a_close(worker: RunningWorker) -> None:
    peer = hold(worker)
    peer.send(Request(close=lane_pb2.Close()))
    number = peer.attachment.session
    until(lambda: session(worker, number) is None)
    with pytest.raises(EOFError):
        peer.receive()
    peer.close()


@pytest.mark.usefixtures("baseline")
def test_without_a_close_the_memory_waits_for_the_process(worker: RunningWorker) -> None:
    with child(worker, "gone") as (process, (number,)):
        until(lambda: _state(worker, number) == SESSION_STATE_QUARANTINE)
        time.sleep(4 * QUARANTINE_MS / 1000)  # the grace is for those that cannot be watched
        info = session(worker, number)
        assert info is not None
        assert (info.leases, info.calls_in_flight) == (0, 0)
        assert info.output_bytes >= LARGE.nbytes
        assert worker.status().sessions_ended == 1
        process.kill()
        until(lambda: session(worker, number) is None)


def _state(worker: RunningWorker, number: int) -> int:
    info = session(worker, number)
    return info.state if info is not None else 0


@pytest.mark.usefixtures("baseline")
def test_after_our_goodbye_the_client_may_still_say_that_it_has_let_go(
    worker: RunningWorker,
) -> None:
    peer = hold(worker)
    number = peer.attachment.session
    peer.sock.send(b"\xff")
    peer.send(infer(2), infer(3))  # already on its way
    assert "is not a LaneRequest" in peer.goodbye().message
    until(lambda: _state(worker, number) == SESSION_STATE_QUARANTINE)
    peer.send(Request(close=lane_pb2.Close()))
    until(lambda: session(worker, number) is None)
    peer.close()


@pytest.mark.usefixtures("baseline")
def test_after_our_goodbye_nobody_listens_for_ever(worker: RunningWorker) -> None:
    """The child is ready when it cannot send any more."""
    with child(worker, "flooding") as (_, (number,)):
        until(lambda: _state(worker, number) == SESSION_STATE_QUARANTINE)


@pytest.mark.usefixtures("baseline")
def test_a_session_without_memory_needs_no_quarantine(worker: RunningWorker) -> None:
    peer = worker.peer()
    peer.answer(infer(1))
    peer.close()
    until(lambda: session(worker, peer.attachment.session) is None)


@pytest.mark.usefixtures("baseline")
def test_memory_is_not_given_back_while_a_run_uses_it(worker: RunningWorker) -> None:
    """The request is cancelled with its session; its run goes on."""
    peer = worker.peer()
    number = peer.attachment.session
    request = by_ref(1, peer.place(peer.grow(1 << 20), LARGE[:1024]), "slow")
    request.infer.inputs.append(tensor_of_array("turns", np.array(100_000, np.int64)))
    runs_before = worker.counters()["slow"].batches
    peer.send(request)
    until(lambda: has_begun(worker, runs_before))
    peer.send(Request(close=lane_pb2.Close()))
    while (info := session(worker, number)) is not None:
        assert info.state in (SESSION_STATE_ACTIVE, SESSION_STATE_DRAINING)
        assert info.input_bytes == 1 << 20
    assert worker.counters()["slow"].batches == runs_before + 1, "the run was over before"
    peer.close()


def has_begun(worker: RunningWorker, runs_before: int) -> bool:
    """A run of "slow", maybe over by now."""
    slow = worker.counters()["slow"]
    return slow.running == 1 or slow.batches > runs_before
