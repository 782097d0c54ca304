# SPDX-License-Identifier: Apache-2.0
"""A server that echoes, and a client of it: for what no real model does on command."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.echo import EchoServer, start
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
