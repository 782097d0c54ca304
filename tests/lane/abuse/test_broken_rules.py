# SPDX-License-Identifier: Apache-2.0
"""What ends a session, with a word that says why."""

import array
import contextlib
import os
import signal
import socket

import psutil
import pytest

from support.lane_peer import PACKET_BYTES_MAX, LanePeer, Request, hello, infer
from support.worker import RunningWorker
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2

MIB = 1 << 20


@pytest.mark.parametrize(
    ("packet", "reason", "text"),
    [
        (b"\xff" * 10, "INVALID_ARGUMENT", "a packet of 10 bytes is not a LaneRequest"),
        (
            b"\0" * (PACKET_BYTES_MAX + 1),
            "INVALID_ARGUMENT",
            f"a packet of more than {PACKET_BYTES_MAX} bytes, or with file descriptors",
        ),
        (hello().SerializeToString(), "INVALID_ARGUMENT", "the lane is attached already"),
        (b"\xa2\x06\x00", "UNIMPLEMENTED", "a packet holds no message that this worker knows"),
        (b"\x30\x05", "UNIMPLEMENTED", "a packet holds no message that this worker knows"),
    ],
)
def test_a_broken_rule_ends_the_session_with_its_name(
    peer: LanePeer, packet: bytes, reason: str, text: str
) -> None:
    peer.sock.send(packet)
    status = peer.goodbye()
    assert pb.Reason.Name(status.reason) == f"REASON_{reason}"
    assert status.message == text


def test_the_reason_arrives_although_more_packets_were_on_their_way(
    worker: RunningWorker, peer: LanePeer
) -> None:
    """A socket that is closed over unread packets takes its last words with it."""
    os.kill(worker.process.pid, signal.SIGSTOP)
    peer.sock.send(b"\xff")
    peer.send(*(infer(call) for call in range(20)))
    os.kill(worker.process.pid, signal.SIGCONT)
    peer.wait_for_hang_up()
    assert peer.goodbye().message == "a packet of 1 bytes is not a LaneRequest"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (infer(1), "the first message must be a hello, got infer"),
        (Request(grow=lane_pb2.GrowRequest(size=1)), "the first message must be a hello, got grow"),
        (Request(flow=1), "the first message must be a hello, got None"),
        (hello(2, 9), "this worker speaks lane versions 1 to 1, the client 2 to 9"),
        (hello(0, 0), "this worker speaks lane versions 1 to 1, the client 0 to 0"),
        (hello(5, 1), "this worker speaks lane versions 1 to 1, the client 5 to 1"),
    ],
)
def test_a_session_begins_with_a_hello_that_fits(
    worker: RunningWorker, message: Request, text: str
) -> None:
    stranger = LanePeer(worker.sockets.pop())
    stranger.send(message)
    assert stranger.goodbye().message == text
    stranger.sock.close()


def test_an_empty_packet_reads_as_the_end(peer: LanePeer) -> None:
    peer.sock.send(b"")
    with pytest.raises(EOFError):
        peer.receive()


def test_unknown_features_are_not_used(worker: RunningWorker) -> None:
    stranger = LanePeer(worker.sockets.pop())
    stranger.send(hello(0, 7, ["teleport", "", "x" * 1000]))
    attached = stranger.receive().attached
    assert (attached.version, list(attached.features)) == (1, [])
    stranger.sock.close()


def test_file_descriptors_are_not_taken(worker: RunningWorker, peer: LanePeer) -> None:
    before = worker.fd_count()
    read, write = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read] * 5))
    peer.sock.sendmsg([infer(1).SerializeToString()], [rights])
    assert "with file descriptors" in peer.goodbye().message
    os.close(read)
    os.close(write)
    assert worker.fd_count() <= before


def test_memory_asked_for_twice_at_a_time_ends_the_session(
    worker: RunningWorker, peer: LanePeer
) -> None:
    os.kill(worker.process.pid, signal.SIGSTOP)  # else it may have answered before the second
    peer.send(*[Request(grow=lane_pb2.GrowRequest(size=MIB))] * 2)
    os.kill(worker.process.pid, signal.SIGCONT)
    assert peer.goodbye().message == "input memory is asked for twice at a time"


def test_a_peer_that_never_reads_is_cut_off(worker: RunningWorker, peer: LanePeer) -> None:
    """Its answers wait for it up to a bound."""
    before = psutil.Process(worker.process.pid).memory_info().rss
    packet = infer(1, "none").SerializeToString()
    with contextlib.suppress(ConnectionError):
        for _ in range(1_000_000):
            peer.sock.send(packet)
    assert peer.is_cut_off()
    assert psutil.Process(worker.process.pid).memory_info().rss - before < 20 * MIB
