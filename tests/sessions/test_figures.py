# SPDX-License-Identifier: Apache-2.0
"""What the metrics say of sessions."""

import grpc
import numpy as np

from support.killable import until
from support.lane_peer import LanePeer, by_ref, connect, hello
from support.server import RunningServer
from thirdrail.v1.metrics_pb2 import ScrapeRequest, SnapshotResponse, WorkerStatus
from thirdrail.v1.metrics_pb2_grpc import MetricsStub
from thirdrail.v1.sessions_pb2 import OpenSessionRequest
from thirdrail.v1.sessions_pb2_grpc import SessionsStub
from thirdrail_server.front.control.metrics_text import prometheus_text

LARGE = np.arange(1 << 18, dtype=np.float32)  # 1 MiB


def figure(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])


def test_a_servers_metrics_follow_its_sessions(
    server: RunningServer, channel: grpc.Channel, sessions: SessionsStub
) -> None:
    names = {
        "sessions": 'thirdrail_worker_sessions{worker="cpu"}',
        "leases": 'thirdrail_worker_leases{worker="cpu"}',
        "leased": 'thirdrail_worker_leased_bytes{worker="cpu"}',
        "input": 'thirdrail_worker_arena_bytes{role="input",worker="cpu"}',
        "output": 'thirdrail_worker_arena_bytes{role="output",worker="cpu"}',
    }

    def figures() -> dict[str, float]:
        text = MetricsStub(channel).Scrape(ScrapeRequest()).text
        return {key: figure(text, name) for key, name in names.items()}

    def growth() -> dict[str, float]:
        """By a session with a call, and by a stranger who is refused."""
        before = figures()
        opened = sessions.OpenSession(OpenSessionRequest())
        peer = LanePeer.of(opened)
        response = peer.answer(by_ref(1, peer.place(peer.grow(LARGE.nbytes), LARGE)))
        assert response.outputs[0].HasField("ref")
        stranger = LanePeer(connect(opened.socket_path))
        stranger.send(hello(token=b"x" * 16))
        stranger.goodbye()
        after = figures()
        peer.leave()
        stranger.close()
        return {key: after[key] - before[key] for key in after}

    expected = {
        "sessions": 1,
        "leases": 1,
        "leased": LARGE.nbytes,
        "input": LARGE.nbytes,
        "output": LARGE.nbytes,
    }
    until(lambda: growth() == expected)  # sessions of earlier tests may end meanwhile
    text = MetricsStub(channel).Scrape(ScrapeRequest()).text
    refused = 'thirdrail_worker_attach_refusals_total{reason="PERMISSION_DENIED",worker="cpu"}'
    assert figure(text, refused) >= 1


def test_every_figure_of_a_worker_is_shown() -> None:
    fields = {
        each.name: number
        for number, each in enumerate(WorkerStatus.DESCRIPTOR.fields, start=100)
        if each.cpp_type in (each.CPPTYPE_UINT32, each.CPPTYPE_UINT64) and each.name != "pid"
    }
    status = WorkerStatus(name="cpu", **fields)  # type: ignore[arg-type]
    status.attach_refusals.add(reason="X", clients=99)
    text = prometheus_text(SnapshotResponse(workers=[status]))
    shown = {line.rpartition(" ")[2] for line in text.splitlines() if "worker" in line}
    of_roles = fields.pop("arena_bytes")  # their sum
    assert {f"{float(number)}" for number in (*fields.values(), 99)} <= shown
    assert f"{float(of_roles)}" not in shown
