# SPDX-License-Identifier: Apache-2.0
"""A server that stops: what is in flight on lanes is answered, and then everybody is told."""

from pathlib import Path

import numpy as np
import pytest

from conftest import StartServer
from support.lane_peer import LanePeer, Request, X, connect, infer
from support.server import STOP_S_MAX, RunningServer
from support.worker import running_worker
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1.sessions_pb2 import OpenSessionRequest
from thirdrail.v1.sessions_pb2_grpc import SessionsStub

STOPPING = "the server is stopping"


@pytest.fixture
def server(start_server: StartServer, standard_repository: Path) -> RunningServer:
    return start_server(standard_repository)


@pytest.fixture
def peer(server: RunningServer) -> LanePeer:
    with server.channel() as channel:
        return LanePeer.of(SessionsStub(channel).OpenSession(OpenSessionRequest()))


def slow(call: int, turns: int) -> Request:
    request = infer(call, "slow")
    request.infer.inputs.append(tensor_of_array("turns", np.array(turns, np.int64)))
    return request


@pytest.mark.slow
def test_calls_in_flight_are_answered_before_the_goodbye(
    server: RunningServer, peer: LanePeer
) -> None:
    peer.send(slow(1, 300_000))  # a second and more: the server hears of its end before
    peer.answer(infer(2))
    server.process.terminate()
    # Now or a little later the server refuses new calls, while the slow one runs.
    number = 3
    while not (response := peer.answer(infer(number))).status.reason:
        assert response.call == number
        number += 1
    refused = response
    if refused.call == 1:
        pytest.fail("the slow call was not answered")
    assert (refused.status.reason, refused.status.message) == (pb.REASON_UNAVAILABLE, STOPPING)
    last = peer.receive().infer
    assert (last.call, last.status.reason, last.outputs[0].raw) == (1, 0, X.tobytes())
    status = peer.goodbye()
    assert (status.reason, status.message) == (pb.REASON_UNAVAILABLE, STOPPING)
    peer.close()
    assert server.process.wait(STOP_S_MAX) == 0


@pytest.mark.slow
def test_a_call_that_takes_too_long_does_not_hold_up_the_end(
    start_server: StartServer, standard_repository: Path
) -> None:
    server = start_server(standard_repository, "--shutdown-seconds=0.2")
    with server.channel() as channel:
        peer = LanePeer.of(SessionsStub(channel).OpenSession(OpenSessionRequest()))
    peer.send(slow(1, 3_000_000))
    peer.answer(infer(2))
    assert server.stop() == 0
    assert peer.goodbye().message == STOPPING
    peer.close()


@pytest.mark.slow  # a worker of its own
def test_a_client_that_has_not_said_hello_is_told_as_well(tmp_path: Path) -> None:
    """Or it would be let in with its token, and served by a worker that takes nobody any more."""
    path = tmp_path / "cpu.lane"
    with running_worker(listen=path) as worker:
        worker.open_session()
        peer = LanePeer(connect(path))
        while worker.status().sessions < 2:  # the front's own lane, and this one
            assert worker.process.poll() is None
        worker.run(worker.control.call("stop sessions", {"drain_s_max": 0}))
        assert peer.goodbye().message == STOPPING
        peer.close()
