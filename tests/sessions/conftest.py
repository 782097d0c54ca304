# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import grpc
import pytest

from support.server import RunningServer
from thirdrail.v1.sessions_pb2_grpc import SessionsStub


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with server.channel() as opened:
        yield opened


@pytest.fixture
def sessions(channel: grpc.Channel) -> SessionsStub:
    return SessionsStub(channel)
