# SPDX-License-Identifier: Apache-2.0
"""Clients of a real server that die at the wrong moment, or do what they must not. In every test a
neighbour calls all the time and notices nothing, and afterwards the server holds what it held
before.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.anchored import Anchored
from support.holdings import Watch
from support.killable import warm_up
from support.models import BATCHED_CONFIG, add, gather, identity, slow, write
from support.neighbours import Neighbour
from support.server import RunningServer, running_server


@pytest.fixture(scope="session")
def abused_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("abused")
    write(folder, "identity", identity())
    write(folder, "identity_fp32", identity())
    write(folder, "identity_bytes", identity("BYTES"))
    write(folder, "add", add())
    write(folder, "batched", add(width=1 << 14), BATCHED_CONFIG)
    write(folder, "gather", gather())
    write(folder, "slow", slow())
    return folder


@pytest.fixture(scope="session")
def server(
    abused_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One for all tests here; its worker may not be killed."""
    warm_up()
    with running_server(abused_repository, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def neighbour(server: RunningServer) -> Iterator[Neighbour]:
    calling = Neighbour(server.url)
    calling.start()
    yield calling
    calling.stop()


@pytest.fixture
def watch(server: RunningServer, neighbour: Neighbour) -> Iterator[Watch]:
    """Looks at the server, which must hold no more in the end than it did before the test."""
    worker = server.worker_pid()
    watch = Watch(server)
    yield watch
    watch.until_back()
    neighbour.has_gone_on()
    assert server.worker_pid() == worker
    log = server.log_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    watch.close()


@pytest.fixture
def anchored(watch: Watch) -> Iterator[Anchored]:
    """All of their processes are killed at the end of the test."""
    peers = Anchored(watch)
    yield peers
    peers.kill()
