# SPDX-License-Identifier: Apache-2.0
"""Sessions that are opened and closed, over and over: no descriptor and no byte is left behind."""

import contextlib

import numpy as np
import psutil
import pytest

from support.holdings import Watch
from support.lane_peer import LanePeer, Request, by_ref
from support.server import RunningServer
from thirdrail import Client
from thirdrail.v1 import lane_pb2

LARGE = np.arange(1 << 15, dtype=np.float32)  # 128 KiB
MIB = 1 << 20
WARM_UP = 100
ATTACHED_AT_ONCE = 8
# The worker's allocator settles somewhere. A descriptor, or a page, for each of them would be more.
GROWTH_BYTES_MAX = 8 * MIB


def cycle(watch: Watch, count: int) -> None:
    """So many sessions, several at a time, each of which uses both kinds of memory."""
    peers: list[LanePeer] = []
    for number in range(count):
        peer = LanePeer.of(watch.opened())
        peers.append(peer)
        response = peer.answer(by_ref(1, peer.place(peer.grow(LARGE.nbytes), LARGE), "identity"))
        assert not response.status.reason
        if len(peers) == ATTACHED_AT_ONCE:
            end(peers.pop(number % ATTACHED_AT_ONCE), number)
    for peer in peers:
        end(peer, 0)


def end(peer: LanePeer, number: int) -> None:
    """In good order, or after a broken rule."""
    if number % 3 == 2:
        peer.sock.send(b"\xff")
        peer.goodbye()
    peer.send(Request(close=lane_pb2.Close()))
    with contextlib.suppress(EOFError):
        while True:
            peer.receive()
    peer.close()


def resident(server: RunningServer) -> int:
    return psutil.Process(server.worker_pid()).memory_info().rss


def leaves_nothing(server: RunningServer, watch: Watch, count: int) -> None:
    cycle(watch, WARM_UP)
    watch.until_back()
    before = resident(server)
    cycle(watch, count)
    watch.until_back()
    assert resident(server) - before < GROWTH_BYTES_MAX


@pytest.mark.slow
def test_some_hundred_sessions_leave_nothing(server: RunningServer, watch: Watch) -> None:
    leaves_nothing(server, watch, 200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_sessions_leave_nothing(server: RunningServer, watch: Watch) -> None:
    leaves_nothing(server, watch, 10_000)


def test_clients_that_come_and_go(server: RunningServer, watch: Watch) -> None:
    for number in range(30):
        with Client(server.url, transport="lane") as client:
            assert np.array_equal(client.infer("identity", LARGE)["y"], LARGE)
            if number % 2:
                kept = client.infer("identity", LARGE, borrow=True)
                assert np.array_equal(kept["y"], LARGE)
                kept.release()
