# SPDX-License-Identifier: Apache-2.0
"""Sessions that send packets of any kind."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.lane_peer import LanePeer, X, infer
from support.random_packets import packets
from support.worker import RunningWorker, running_worker
from thirdrail.lane.aio import AsyncLane
from thirdrail_server.config import LaneLimits, WorkerConfig

ANSWER_S_MAX = 60
MIB = 1 << 20


def throw(worker: RunningWorker, neighbour: AsyncLane, count: int) -> None:
    """So many sessions, each with a few packets of any kind."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(packets, min_size=1, max_size=6))
    def one_session(sent: list[bytes]) -> None:
        peer = LanePeer(worker.sockets.pop())
        peer.attach()
        try:
            for packet in sent:
                peer.sock.send(packet)
            peer.send(infer(777))
            while peer.receive().infer.call != 777:
                pass
        except (EOFError, ConnectionError):
            pass  # one of the packets ended the session
        finally:
            peer.sock.close()
        assert worker.infer(neighbour, infer(1).infer).data[0] == X.tobytes()

    one_session()


def footprint(worker: RunningWorker) -> tuple[int, int]:
    """Resident bytes and descriptors."""
    return psutil.Process(worker.process.pid).memory_info().rss, worker.fd_count()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_S_MAX
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_random_packets(worker: RunningWorker, neighbour: AsyncLane) -> None:
    throw(worker, neighbour, 40)  # what grows only once has grown
    rss, fds = footprint(worker)
    sockets = len(worker.sockets)
    throw(worker, neighbour, 150)
    ended = sockets - len(worker.sockets)
    until(lambda: worker.status().sessions == len(worker.sockets) + 1)
    until(lambda: worker.fd_count() <= fds - ended)
    assert footprint(worker)[0] - rss < 20 * MIB


@pytest.mark.slow
def test_many_more_random_packets(
    standard_repository: Path, tmp_path: Path, limits: LaneLimits
) -> None:
    for number in range(5):
        log = tmp_path / f"{number}.txt"
        with running_worker(WorkerConfig(lane=limits), lanes=450, log=log) as worker:
            worker.load(standard_repository, "identity_fp32", "add", "identity_bytes", "gather")
            throw(worker, worker.attach(), 400)
        assert "Traceback" not in log.read_text()
