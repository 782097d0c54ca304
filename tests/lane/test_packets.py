# SPDX-License-Identifier: Apache-2.0
"""One message, one packet, on real sockets: the last words of a peer."""

import socket
from collections.abc import Callable

import pytest

from thirdrail.lane import packets


def received(sock: socket.socket) -> bytes:
    return packets.receive_with_fds(sock, 100)[0]


def received_without_fds(sock: socket.socket) -> bytes:
    return packets.receive(sock, 100)


@pytest.mark.parametrize("receive", [received, received_without_fds])
def test_the_last_words_of_a_peer_that_did_not_read_ours(
    receive: Callable[[socket.socket], bytes],
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        packets.send(ours, b"unread")
        packets.send(theirs, b"goodbye")
        theirs.close()
        assert receive(ours) == b"goodbye"
        assert receive(ours) == b""
