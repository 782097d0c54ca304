# SPDX-License-Identifier: Apache-2.0
"""What the log says of clients that end: one that is just gone is nobody's to act on."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import cast

import pytest

from support.lane_peer import ANSWER_S_MAX, LanePeer, Request
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import LaneLimits, WorkerConfig
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.sessions import SessionTable

PING = Request(ping=lane_pb2.Ping())
PACKETS = 100_000  # more than any kernel keeps for one who does not read

Told = list[tuple[int, str]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[..., Told]:
    """told(client): what is logged about a client from its hello to its end, with the levels.

    is_held_up: the worker does nothing meanwhile.
    """

    async def serve(client: Callable[[LanePeer], None], is_held_up: bool) -> None:
        config = WorkerConfig(lane=LaneLimits(calls_in_flight_max=1))
        sessions = SessionTable(config, cast("ModelTable", None), lambda _: None)
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            sessions.inherit(theirs, is_front=False)
            peer = LanePeer(ours)
            await asyncio.to_thread(peer.attach)
            client(peer) if is_held_up else await asyncio.to_thread(client, peer)
            async with asyncio.timeout(ANSWER_S_MAX):
                while sessions.infos():
                    await asyncio.sleep(0)
        sessions.close()

    def run(client: Callable[[LanePeer], None], *, is_held_up: bool = False) -> Told:
        with caplog.at_level(logging.DEBUG, "thirdrail_server"):
            asyncio.run(serve(client, is_held_up))
        return [(each.levelno, each.message) for each in caplog.records]

    return run


def test_a_client_that_is_gone_before_its_answer_is_no_warning(told: Callable[..., Told]) -> None:
    def leave(peer: LanePeer) -> None:
        peer.send(PING)
        peer.close()

    [(level, text)] = told(leave, is_held_up=True)
    assert (level, "the peer is gone: Broken pipe" in text) == (logging.DEBUG, True)


def test_a_client_that_does_not_read_is_a_warning(told: Callable[..., Told]) -> None:
    def flood(peer: LanePeer) -> None:
        with contextlib.suppress(OSError):
            for _ in range(PACKETS):
                peer.send(PING)

    assert any(
        level == logging.WARNING and "the peer does not read" in text for level, text in told(flood)
    )
