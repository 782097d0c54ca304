# SPDX-License-Identifier: Apache-2.0
"""From OpenSession to the first call, against a real server."""

import os
import stat
from pathlib import Path

import grpc
import numpy as np
import pytest

from support.lane_peer import LanePeer, X, by_ref, infer
from support.server import RunningServer
from thirdrail.v1.sessions_pb2 import (
    SESSION_STATE_ACTIVE,
    SESSION_STATE_OPENING,
    ListSessionsRequest,
    OpenSessionRequest,
)
from thirdrail.v1.sessions_pb2_grpc import SessionsStub
from thirdrail_server.config import ControlLimits, ServerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.front.control.supervisor import Lane, Supervisor
from thirdrail_server.front.control.worker_process import WorkerProcess
from thirdrail_server.front.sessions.service import SessionsServicer

LARGE = np.arange(1 << 18, dtype=np.float32)  # 1 MiB: never inline


def test_a_token_opens_a_session_that_infers(sessions: SessionsStub) -> None:
    opened = sessions.OpenSession(OpenSessionRequest())
    peer = LanePeer.of(opened, client_name="a test")
    assert peer.attachment.session == opened.session
    assert peer.answer(infer(1)).outputs[0].raw == X.tobytes()
    response = peer.answer(by_ref(2, peer.place(peer.grow(LARGE.nbytes), LARGE)))
    assert np.array_equal(peer.read(response.outputs[0].ref), LARGE)
    (mine,) = [
        each
        for each in sessions.ListSessions(ListSessionsRequest()).sessions
        if each.session == opened.session
    ]
    assert mine.state == SESSION_STATE_ACTIVE
    assert (mine.client_name, mine.pid, mine.uid) == ("a test", os.getpid(), os.geteuid())
    assert (mine.worker, mine.calls, mine.leases, mine.is_front) == ("cpu", 2, 1, False)
    assert mine.leased_bytes == LARGE.nbytes
    peer.leave()


def test_the_socket_lies_beside_the_servers_own(
    server: RunningServer, sessions: SessionsStub
) -> None:
    opened = sessions.OpenSession(OpenSessionRequest())
    path = Path(opened.socket_path)
    assert path == server.socket.with_name("grpc.cpu.lane")
    assert path.name == opened.socket_name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (len(opened.token), opened.token_life_ms) == (16, 5000)


def test_an_opened_session_is_listed_before_anybody_attaches(sessions: SessionsStub) -> None:
    opened = sessions.OpenSession(OpenSessionRequest())
    listed = sessions.ListSessions(ListSessionsRequest()).sessions
    (mine,) = [each for each in listed if each.session == opened.session]
    assert mine.state == SESSION_STATE_OPENING
    assert [each.is_front for each in listed].count(True) == 1


async def test_a_worker_that_is_not_there_is_named_among_the_sessions(tmp_path: Path) -> None:
    def start() -> WorkerProcess:
        raise AssertionError("nobody starts it")

    async def attach(_sock: object) -> Lane:
        raise AssertionError("nobody attaches")

    down = Supervisor("cuda:0", start, attach, ControlLimits(), ChannelLimits())
    servicer = SessionsServicer(ServerConfig(tmp_path), [down])
    listed = await servicer.ListSessions(ListSessionsRequest(), None)
    assert list(listed.sessions) == []
    assert dict(listed.unheard) == {
        "cuda:0": "worker 'cuda:0' is not running; it is being restarted"
    }


def test_an_unknown_worker_is_named(sessions: SessionsStub) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        sessions.OpenSession(OpenSessionRequest(worker="cuda:7"))
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert failure.value.details() == "there is no worker 'cuda:7', this server has 'cpu'"
