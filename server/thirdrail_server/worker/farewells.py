# SPDX-License-Identifier: Apache-2.0
"""Sockets on which we have said goodbye, held open for a moment.

A client that is just sending would get EPIPE from a closed socket, or ECONNRESET where we left
something of its unread, and would not look for the goodbye that says why.
"""

import asyncio
import contextlib
import socket

LINGER_S = 1.0
LINGERING_MAX = 64  # of more, the oldest are hung up on
PACKETS_MAX = 1024  # that one may still send; none is looked at
PACKETS_PER_WAKEUP_MAX = 64


class Farewells:
    """Lives on a loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lingering: dict[socket.socket, asyncio.TimerHandle] = {}  # oldest first
        self._packets_left: dict[socket.socket, int] = {}

    def linger(self, sock: socket.socket) -> None:
        """Take over a socket whose last packet is sent; close it when the client has hung up."""
        while len(self._lingering) >= LINGERING_MAX:
            self._hang_up(next(iter(self._lingering)))
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        self._lingering[sock] = self._loop.call_later(LINGER_S, self._hang_up, sock)
        self._packets_left[sock] = PACKETS_MAX
        self._loop.add_reader(sock, self._on_readable, sock)

    def _on_readable(self, sock: socket.socket) -> None:
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            try:
                packet = sock.recv(1)
            except BlockingIOError:
                return None
            except OSError:
                return self._hang_up(sock)
            self._packets_left[sock] -= 1
            if not packet or not self._packets_left[sock]:
                return self._hang_up(sock)

    def _hang_up(self, sock: socket.socket) -> None:
        self._lingering.pop(sock).cancel()
        del self._packets_left[sock]
        self._loop.remove_reader(sock)
        hang_up(sock)

    def close(self) -> None:
        for sock in list(self._lingering):
            self._hang_up(sock)


def hang_up(sock: socket.socket) -> None:
    """Close a socket whose peer may have our last packet still to read: so leave nothing of its
    own unread."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # nothing more can come
        while sock.recv(1):
            pass
    sock.close()
