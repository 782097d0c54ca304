# SPDX-License-Identifier: Apache-2.0
"""A real worker whose device is a twin, and clients of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from onnx import helper

from support.device_peer import DevicePeer
from support.lane_peer import connect
from support.models import add, double, identity, model, tensor, write
from support.server import RunningServer, running_server
from support.worker import RunningWorker, running_worker
from thirdrail_engines.cuda.twin import TWIN_FACTS
from thirdrail_server.config import DeviceLimits, SessionLimits, WorkerConfig

TESTS = Path(__file__).parent.parent
UUID = TWIN_FACTS.uuid
LIMITS = DeviceLimits(
    places_max=4,
    input_arena_bytes_max=8 << 20,
    output_arena_bytes_max=4 << 20,
    arena_bytes_per_uid_max=32 << 20,
    arena_bytes_total_max=32 << 20,
)
CONFIG = WorkerConfig(
    name=f"cuda:{UUID}",
    device=UUID,
    lane_device=LIMITS,
    sessions=SessionLimits(quarantine_ms=200),
)

MakePeer = Callable[[], DevicePeer]


def write_models(repository: Path) -> None:
    """`host_` models run on the CPU, `twin_` ones on the device. All have `x` and `y`, or more."""
    write(repository, "host_double", double())
    write(repository, "twin_double", double())
    write(repository, "twin_identity", identity())
    write(repository, "host_add", add())
    write(repository, "host_both", both())


def both() -> onnx.ModelProto:
    """y = z = x."""
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in "yz"]
    x, *outputs = (tensor(name, "FP32", ("n",)) for name in "xyz")
    return model(nodes, [x], outputs)


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While it exists, models on the device compute nothing."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Iterator[RunningWorker]:
    repository = tmp_path_factory.mktemp("repository")
    write_models(repository)
    listen = tmp_path_factory.mktemp("lane") / "lane.sock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THIRDRAIL_TEST_GATE", str(gate))
        patch.setenv("PYTHONPATH", str(TESTS))
        with running_worker(CONFIG, listen=listen, module="support.twin_lane_worker") as running:
            running.load(repository)
            yield running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Iterator[RunningServer]:
    """A whole server, whose worker has a twin as well. Those who kill it wait for the next one."""
    repository = tmp_path_factory.mktemp("repository")
    write_models(repository)
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THIRDRAIL_TEST_GATE", str(gate))
        with running_server(repository, folder, module="support.twin_lane_server") as running:
            yield running


@pytest.fixture
def make_peer(worker: RunningWorker) -> Iterator[MakePeer]:
    """Clients with tokens, which leave in good order."""
    peers: list[DevicePeer] = []

    def make() -> DevicePeer:
        assert worker.lane_path is not None
        peers.append(DevicePeer(connect(worker.lane_path)))
        peers[-1].attach(token=worker.open_session().token, features=["device"])
        return peers[-1]

    yield make
    for peer in peers:
        if peer.sock.fileno() >= 0:
            peer.leave()


@pytest.fixture
def peer(make_peer: MakePeer) -> DevicePeer:
    """Has a device already."""
    found = make_peer()
    assert not found.ask_for_device().HasField("status")
    return found
