# SPDX-License-Identifier: Apache-2.0
"""A server that echoes, and a client of it: for what no real model does on command."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.echo import EchoServer, start
from support.lane_reading import until_no_watcher
from support.lanes import ScriptedPeer
from thirdrail import Client


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[EchoServer]:
    servicer = EchoServer(tmp_path / "echo.sock")
    server = start(servicer)
    yield servicer
    servicer.release.set()
    server.stop(None).wait()


@pytest.fixture
def client(echo: EchoServer) -> Iterator[Client]:
    with Client(echo.url) as client:
        yield client


@pytest.fixture
def peer() -> Iterator[ScriptedPeer]:
    """A worker that does what a test says. Nothing of earlier tests reads lanes any more."""
    until_no_watcher()  # of earlier tests
    with ScriptedPeer() as peer:
        yield peer
