# SPDX-License-Identifier: Apache-2.0
"""What a client may not do on a lane: it is answered, or ends that session, but no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.lane_peer import LanePeer, X, infer
from support.worker import RunningWorker, running_worker
from thirdrail.lane.aio import AsyncLane
from thirdrail_server.config import LaneLimits, WorkerConfig

LANES = 300
LIMITS = LaneLimits(
    calls_in_flight_max=32, input_arena_bytes_max=8 << 20, output_arena_bytes_max=8 << 20
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker") / "log.txt"


@pytest.fixture(scope="session")
def limits() -> LaneLimits:
    return LIMITS


@pytest.fixture(scope="module")
def worker(standard_repository: Path, log: Path) -> Iterator[RunningWorker]:
    with running_worker(WorkerConfig(lane=LIMITS), lanes=LANES, log=log) as running:
        running.load(standard_repository, "identity_fp32", "add", "identity_bytes", "gather")
        yield running


@pytest.fixture(scope="module")
def neighbour(worker: RunningWorker) -> AsyncLane:
    """A well-behaved session that must not notice anything."""
    return worker.attach()


@pytest.fixture(autouse=True)
def nobody_else_notices(worker: RunningWorker, neighbour: AsyncLane, log: Path) -> Iterator[None]:
    yield
    reply = worker.infer(neighbour, infer(1).infer)
    assert reply.data[0] == X.tobytes()
    assert "Traceback" not in log.read_text()
    assert "Exception" not in log.read_text()


@pytest.fixture
def peer(worker: RunningWorker) -> Iterator[LanePeer]:
    attached = LanePeer(worker.sockets.pop())
    attached.attach()
    yield attached
    attached.close()
