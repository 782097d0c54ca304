# SPDX-License-Identifier: Apache-2.0
"""Packets that make no sense, from clients of the listening socket, before and after their hello.

tests/lane/abuse has more kinds of them, on sockets that were inherited.
"""

import array
import contextlib
import os
import socket

import numpy as np
import pytest

from support.anchored import Anchored
from support.holdings import Watch
from support.killable import until
from support.lane_peer import PACKET_BYTES_MAX, Request, hello, infer
from support.server import RunningServer
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail.v1.sessions_pb2 import SESSION_STATE_QUARANTINE

FDS_MAX = 253  # that the kernel takes beside one packet (SCM_MAX_FD)
VALID = infer(1).SerializeToString()
GRANTED = 1 << 20

GARBAGE = {
    "noise": (b"\xff" * 100, "a packet of 100 bytes is not a LaneRequest"),
    "cut short": (VALID[:-1], f"a packet of {len(VALID) - 1} bytes is not a LaneRequest"),
    "too large": (b"\0" * (PACKET_BYTES_MAX + 1), f"a packet of more than {PACKET_BYTES_MAX} byt"),
    "unknown kind": (b"\xa2\x06\x00", "a packet holds no message that this worker knows"),
    "a response": (
        lane_pb2.LaneResponse(pong=lane_pb2.Pong(request=1)).SerializeToString(),
        "",
    ),
    "second hello": (hello().SerializeToString(), "the lane is attached already"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_ends_the_session_which_is_told_why(
    anchored: Anchored, watch: Watch, what: str
) -> None:
    """Its memory waits until its process is gone, or says that it has let go."""
    packet, text = GARBAGE[what]
    peer = anchored.attach()
    peer.grow(GRANTED)
    peer.sock.send(packet)
    status = peer.goodbye()
    assert status.reason in (pb.REASON_INVALID_ARGUMENT, pb.REASON_UNIMPLEMENTED)
    assert status.message.startswith(text)
    until(lambda: [each.state for each in watch.others()] == [SESSION_STATE_QUARANTINE])
    assert watch.others()[0].input_bytes == GRANTED
    anchored.kill()
    watch.until_back()


@pytest.mark.slow
@pytest.mark.parametrize("what", [*GARBAGE, "a call", "memory", "nothing"])
def test_garbage_before_the_hello(anchored: Anchored, watch: Watch, what: str) -> None:
    peer = anchored.connect()
    others = {
        "a call": VALID,
        "memory": Request(grow=lane_pb2.GrowRequest(size=1)).SerializeToString(),
        "nothing": b"",
    }
    peer.sock.send(others[what] if what in others else GARBAGE[what][0])
    if what == "nothing":  # which reads as the end
        with pytest.raises(EOFError):
            peer.receive()
    else:
        assert peer.goodbye().message
    watch.until_back()


@pytest.mark.parametrize("count", [1, 4, 5, FDS_MAX])
@pytest.mark.parametrize("is_attached", [True, False], ids=["attached", "before the hello"])
def test_descriptors_are_not_taken(
    anchored: Anchored, watch: Watch, count: int, is_attached: bool
) -> None:
    """Neither pipes nor the lane's own socket, with which a circle could be made."""
    peer = anchored.attach() if is_attached else anchored.connect()
    read, write = os.pipe()
    fds = [(read, write, peer.sock.fileno())[number % 3] for number in range(count)]
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    peer.sock.sendmsg([VALID], [rights])
    status = peer.goodbye()
    assert status.reason == pb.REASON_INVALID_ARGUMENT
    assert "with file descriptors" in status.message
    os.close(write)
    assert os.read(read, 1) == b"", "nobody else has the pipe any more"
    os.close(read)
    anchored.kill()
    watch.until_back()


def test_what_follows_after_garbage_is_not_looked_at(anchored: Anchored, watch: Watch) -> None:
    peer = anchored.attach()
    before = watch.counters("gather").requests_ok
    index = tensor_of_array("index", np.zeros(1, np.int64))
    peer.sock.send(b"\xff")
    with contextlib.suppress(ConnectionError):
        peer.send(*[infer(call, "gather", inputs=[index]) for call in range(100)])
    assert "is not a LaneRequest" in peer.goodbye().message
    assert watch.counters("gather").requests_ok == before


def test_a_client_that_shuts_one_direction(anchored: Anchored, watch: Watch) -> None:
    """Not to be read any more is the end, and so is not to be written to."""
    for how in (socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR):
        peer = anchored.attach()
        peer.grow(GRANTED)
        peer.sock.shutdown(how)
        if how == socket.SHUT_RD:
            with contextlib.suppress(ConnectionError):
                peer.send(infer(1))
        anchored.kill()
        watch.until_back()


def test_the_same_packet_again_and_again(anchored: Anchored) -> None:
    """A replay is a call like any other, unless its number is in flight."""
    peer = anchored.attach()
    for _ in range(50):
        assert not peer.answer(infer(1)).status.reason


def test_a_name_writes_no_line_of_its_own_into_the_log(
    server: RunningServer, anchored: Anchored, watch: Watch
) -> None:
    """Nor does it reach the terminal of whoever lists the sessions."""
    name = "nobody\n00:00:00.000 error   front: all is lost\r\x1b[2J\x00\u202e"
    peer = anchored.attach(client_name=name)
    peer.grow(GRANTED)
    (listed,) = watch.others()
    assert listed.client_name.isprintable()
    assert listed.client_name.startswith("nobody")
    peer.sock.send(b"\xff")
    peer.goodbye()
    until(lambda: "all is lost" in server.log_text())
    lines = server.log_text().splitlines()
    assert not [line for line in lines if line.startswith("00:00:00.000")]
    assert "\x1b" not in server.log_text()
