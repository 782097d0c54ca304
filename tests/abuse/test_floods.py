# SPDX-License-Identifier: Apache-2.0
"""Clients that take more than their share: who never read, never release, or never stop asking."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.anchored import Anchored
from support.dying import slowly
from support.holdings import Watch
from support.killable import until
from support.lane_peer import LanePeer, Request, Response, X, by_ref, infer
from support.server import RunningServer, running_server
from thirdrail import Client, NotNow
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail.v1.sessions_pb2 import SESSION_STATE_QUARANTINE
from thirdrail.v1.tensor_pb2 import ArenaRef

MIB = 1 << 20
LARGE = np.arange(MIB // 4, dtype=np.float32)
MEMORY_MIB = 64  # of the small server, half of it for one user
PACKETS = 200_000


def granted(peer: LanePeer) -> lane_pb2.Chunk:
    return peer.grow(LARGE.nbytes)


@pytest.mark.parametrize("what", ["inline", "results", "refusals", "pongs", "memory"])
def test_who_never_reads_is_cut_off(
    server: RunningServer, anchored: Anchored, watch: Watch, what: str
) -> None:
    """What waits for it is bounded, and all that it leased comes back."""
    peer = anchored.attach()
    ref = peer.place(granted(peer), LARGE)
    packets = {
        "inline": infer(1, "identity"),
        "results": by_ref(1, ref, "identity"),
        "refusals": infer(1, "nobody"),
        "pongs": Request(ping=lane_pb2.Ping(request=1)),
        "memory": Request(grow=lane_pb2.GrowRequest(size=1, alone=True)),
    }
    process = psutil.Process(server.worker_pid())
    before = process.memory_info().rss
    packet = packets[what].SerializeToString()
    with contextlib.suppress(ConnectionError):
        for _ in range(PACKETS):
            peer.sock.send(packet)
    assert peer.is_cut_off()
    until(lambda: [each.state for each in watch.others()] == [SESSION_STATE_QUARANTINE])
    assert watch.others()[0].leases == 0
    arenas = watch.others()[0].input_bytes + watch.others()[0].output_bytes
    assert process.memory_info().rss - before - arenas < 30 * MIB
    assert "Traceback" not in server.log_text()


def test_more_calls_than_the_queue_takes(anchored: Anchored, watch: Watch) -> None:
    """Each is answered or ends with its session; the queue is another client's as well."""
    peer = anchored.attach()
    ref = peer.place(granted(peer), LARGE)
    calls, refused = 5000, 0
    peer.sock.settimeout(0.0)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        for sent in range(1, calls):
            peer.sock.send(slowly(sent, ref).SerializeToString())
            with contextlib.suppress(BlockingIOError):
                refused += bool(Response.FromString(peer.sock.recv(1 << 16)).infer.status.reason)
    until(lambda: watch.counters("slow").queued > 0)
    assert sent > 100
    anchored.kill()
    until(lambda: not watch.others() or not watch.counters("slow").queued)


def test_a_call_of_another_client_does_not_wait_for_a_flood(
    anchored: Anchored, watch: Watch
) -> None:
    """Clients take turns: whoever asks for one thing waits for one run of the other's many."""
    flooding, other = anchored.attach(), anchored.attach()
    ref = flooding.place(granted(flooding), LARGE)
    calls = 200
    flooding.send(*[slowly(call, ref, 5000) for call in range(calls)])
    until(lambda: watch.counters("slow").queued > calls // 2)
    inputs = [tensor_of_array("x", X), tensor_of_array("turns", np.array(1, np.int64))]
    for call in range(5):
        assert not other.answer(infer(call, "slow", inputs=inputs)).status.reason
    answered, is_empty = 0, False
    flooding.sock.settimeout(0.0)
    while not is_empty:
        try:
            answered += flooding.receive().HasField("infer")
        except BlockingIOError:
            is_empty = True
    assert answered < calls // 2, "five calls waited for most of the flood"
    flooding.sock.settimeout(20)
    # Each ends; the rest of the runs would take long, which leaves this test its time to look.
    flooding.send(*[Request(cancel=pb.Cancel(call=call)) for call in range(calls)])
    while answered < calls:
        response = flooding.receive()
        if response.HasField("infer"):
            answered += 1
            assert response.infer.status.reason in (0, pb.REASON_CANCELLED)


def test_grpc_and_lane_clients_are_served_during_a_flood(
    server: RunningServer, anchored: Anchored
) -> None:
    """Three clients send as fast as they can; nobody else fails or is forgotten."""
    stopping = threading.Event()
    counted = [0, 0, 0]

    def flood(number: int, peer: LanePeer) -> None:
        call = 0
        while not stopping.is_set():
            peer.send(*[infer(call + each, "identity") for each in range(32)])
            for _ in range(32):
                assert not peer.receive().infer.status.reason
            call += 32
            counted[number] = call

    peers = [anchored.attach() for _ in counted]
    floods = [threading.Thread(target=flood, args=each) for each in enumerate(peers)]
    for each in floods:
        each.start()
    try:
        with Client(server.url, transport="grpc") as far, Client(server.url) as near:
            for client in (far, near):
                for number in range(40):
                    sent = np.full(16, number, np.float32)
                    assert np.array_equal(client.infer("identity", sent, timeout=30)["y"], sent)
        until(lambda: min(counted) > 32)
    finally:
        stopping.set()
        for each in floods:
            each.join()


# Memory


@pytest.fixture(scope="module")
def small_server(
    abused_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """With little shared memory."""
    folder = tmp_path_factory.mktemp("small")
    with running_server(abused_repository, folder, [f"--lane-memory-mib={MEMORY_MIB}"]) as running:
        yield running


@pytest.fixture
def small(small_server: RunningServer) -> Iterator[Anchored]:
    """Its clients; nothing of them is left in the end."""
    watch = Watch(small_server)
    anchored = Anchored(watch)
    yield anchored
    anchored.kill()
    watch.until_back()
    watch.close()


def hoard(peer: LanePeer, ref: ArenaRef) -> pb.Status:
    """Take results and release none, up to the end: what that is."""
    for call in range(MEMORY_MIB):
        status = peer.answer(by_ref(call, ref, "identity")).status
        if status.reason:
            return status
    raise AssertionError("there was no end")


def test_who_never_releases_ends_for_whoever_needs_memory(
    small_server: RunningServer, small: Anchored
) -> None:
    """It is told so, by name, and so is the log; what it has mapped stays as it is."""

    def ask() -> None:
        with contextlib.suppress(NotNow):  # the hoarder's process lives on for too long
            needy.infer("identity", LARGE, timeout=30)

    hoarder = small.attach(client_name="hoarder")
    refused = hoard(hoarder, hoarder.place(granted(hoarder), LARGE))
    assert refused.reason == pb.REASON_RESOURCE_EXHAUSTED
    mapped = next(iter(hoarder.chunks.values()))
    kept = bytes(mapped[:4096])
    with Client(small_server.url, transport="lane") as needy:
        asked = threading.Thread(target=ask)
        asked.start()
        status = hoarder.goodbye()
        small.kill()
        asked.join()
        assert np.array_equal(needy.infer("identity", LARGE, timeout=30)["y"], LARGE)
    assert status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert "'hoarder'" in status.message
    assert "more than its fair share" in status.message
    until(lambda: status.message in small_server.log_text())
    assert bytes(mapped[:4096]) == kept


def test_many_hoarders_leave_room_for_everybody(
    small_server: RunningServer, small: Anchored
) -> None:
    hoarders = [small.attach() for _ in range(4)]
    refs = [hoarder.place(granted(hoarder), LARGE) for hoarder in hoarders]
    for hoarder, ref in zip(hoarders, refs, strict=True):
        with contextlib.suppress(EOFError, ConnectionError):  # ended for another one
            hoard(hoarder, ref)
    small.kill()
    with Client(small_server.url, transport="lane") as needy:
        assert np.array_equal(needy.infer("identity", LARGE, timeout=30)["y"], LARGE)
