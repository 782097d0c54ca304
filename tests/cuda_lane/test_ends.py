# SPDX-License-Identifier: Apache-2.0
"""How sessions with memory on a device end: killed, broken off, with work under way."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cuda_lane.conftest import TESTS, MakePeer
from support.device_peer import DevicePeer, on_device
from support.lane_peer import Request
from support.worker import RunningWorker
from thirdrail.v1 import lane_pb2, sessions_pb2

pytestmark = pytest.mark.slow  # processes that are killed, and start again

X = np.arange(8, dtype=np.float32)
MIB = 1 << 20
WAIT_S_MAX = 20

# Has memory on the device and a request there, and never comes to an end by itself.
CLIENT = """
import sys, time
import numpy as np
from support.device_peer import DevicePeer, on_device
from support.lane_peer import connect

path, token, is_written = sys.argv[1], bytes.fromhex(sys.argv[2]), sys.argv[3] == "written"
peer = DevicePeer(connect(path))
peer.attach(token=token, features=["device"])
peer.ask_for_device()
source = peer.put(peer.grow_on_device(32), np.arange(8, dtype=np.float32))
peer.record_in_ready(1, is_done=is_written)
if is_written:
    answer = peer.answer(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
    assert not answer.HasField("status"), answer.status
else:
    peer.send(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
print(peer.attachment.session, flush=True)
while True:
    peer.put(source, np.ones(8, np.float32))
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The device computes nothing until the file is gone."""
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


def works(peer: DevicePeer) -> None:
    source = peer.put(peer.grow_on_device(X.nbytes), X)
    peer.record_in_ready(1)
    answer = peer.answer(on_device(77, 1, {"x": source}, "twin_double", ["y"]))
    assert peer.out_done(1).wait(WAIT_S_MAX)
    assert peer.get(answer.outputs[0].ref).tolist() == (2 * X).tolist()


def state(worker: RunningWorker, session: int) -> int:
    info = worker.sessions().get(session)
    return sessions_pb2.SESSION_STATE_FREED if info is None else info.state


@pytest.mark.parametrize("when", ["written", "being written"])
def test_a_client_that_is_killed(worker: RunningWorker, peer: DevicePeer, when: str) -> None:
    """While it writes its memory: with its run done, or never begun."""
    assert worker.lane_path is not None
    token = worker.open_session().token.hex()
    command = [sys.executable, "-c", CLIENT, str(worker.lane_path), token, when]
    client = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(TESTS)}
    )
    assert client.stdout is not None
    session = int(client.stdout.readline())
    assert worker.sessions()[session].device_bytes >= 2 * MIB
    client.kill()
    client.communicate()
    until(lambda: session not in worker.sessions())
    works(peer)


@pytest.mark.parametrize("how", ["leave", "close"])
def test_memory_stays_until_the_device_is_done(
    worker: RunningWorker, make_peer: MakePeer, closed: Path, how: str
) -> None:
    peer = make_peer()
    peer.ask_for_device()
    source = peer.put(peer.grow_on_device(X.nbytes), X)
    for place in (1, 2, 3):
        peer.record_in_ready(place, is_done=place < 3)
        peer.send(on_device(place, place, {"x": source}, "twin_double", ["y"]))
    while peer.receive().infer.call != 2:
        pass
    session, memory = peer.attachment.session, peer.memory
    getattr(peer, how)()
    until(lambda: state(worker, session) == sessions_pb2.SESSION_STATE_DRAINING)
    for _ in range(5):  # the janitor looks again and again
        assert state(worker, session) == sessions_pb2.SESSION_STATE_DRAINING
    closed.unlink()
    if how == "leave":  # of one that broke off, this process lives on and may still read
        until(lambda: session not in worker.sessions())
    else:
        until(lambda: state(worker, session) == sessions_pb2.SESSION_STATE_QUARANTINE)
    first = next(iter(memory.values()))
    assert first.view[: X.nbytes].view(np.float32).tolist() == X.tolist(), "ours stays mapped"


def test_a_rule_is_broken_with_runs_under_way(
    worker: RunningWorker, make_peer: MakePeer, peer: DevicePeer, gate: Path
) -> None:
    bad = make_peer()
    bad.ask_for_device()
    source = bad.put(bad.grow_on_device(X.nbytes), X)
    gate.touch()
    try:
        bad.record_in_ready(1)
        bad.answer(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
        bad.send(Request(hello=lane_pb2.Hello()))
        assert "attached already" in bad.goodbye().message
    finally:
        gate.unlink()
    bad.leave()
    until(lambda: bad.attachment.session not in worker.sessions())
    works(peer)


def test_nothing_is_left_of_those_that_have_gone(
    worker: RunningWorker, make_peer: MakePeer
) -> None:
    def ends() -> None:
        peer = make_peer()
        peer.ask_for_device()
        works(peer)
        session = peer.attachment.session
        peer.leave()
        until(lambda: session not in worker.sessions())

    ends()
    before = worker.fd_count()
    for _ in range(5):
        ends()
    until(lambda: worker.fd_count() <= before)
