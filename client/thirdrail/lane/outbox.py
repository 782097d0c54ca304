# SPDX-License-Identifier: Apache-2.0
"""Packets on their way out of a non-blocking socket: sent at once, or kept in order for later.

Both ends of a lane use it. The kernel's queue takes a few hundred small packets; what it does not
take waits here, up to a bound that a peer within its credit never reaches.
"""

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

from thirdrail.lane import packets


class Outbox:
    """The sending half of a lane's socket.

    packets_max: how many may wait.
    fail: told why the peer cannot be reached any more; it must call `close`.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        packets_max: int,
        fail: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._loop = loop
        self._fail = fail
        self.packets_max = packets_max
        self._waiting: deque[tuple[bytes, Sequence[int]]] = deque()
        self._is_closed = False
        # For `send_now`: held while the socket may be sent on beside the loop. Whoever must get
        # packets out in a row holds it as well.
        self.lock = threading.RLock()

    @property
    def waiting(self) -> int:
        """Packets that the kernel has not taken yet."""
        return len(self._waiting)

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send in order. Takes over `fds` and closes them once they are sent or cannot be."""
        if self._is_closed or self._waiting:
            return self._keep(packet, fds)
        try:
            packets.send(self._sock, packet, fds)
        except BlockingIOError:
            self._keep(packet, fds)
            self._loop.add_writer(self._sock, self._on_writable)
        except OSError as error:
            packets.close_all(fds)
            self._fail(f"the peer is gone: {error.strerror}")
        else:
            packets.close_all(fds)

    def send_now(self, packet: bytes) -> bool:
        """Send from any thread, out of turn. False: it was not sent, and is left to the loop."""
        with self.lock:
            if self._is_closed or self._waiting:
                return False
            try:
                packets.send(self._sock, packet)
            except OSError:  # no room, or no peer: the loop will find the same
                return False
            return True

    def _keep(self, packet: bytes, fds: Sequence[int]) -> None:
        if self._is_closed:
            return packets.close_all(fds)
        self._waiting.append((packet, fds))
        if len(self._waiting) > self.packets_max:
            self._fail(f"the peer does not read: {len(self._waiting)} packets wait for it")

    def _on_writable(self) -> None:
        try:
            while self._waiting:
                packet, fds = self._waiting[0]
                packets.send(self._sock, packet, fds)
                self._waiting.popleft()
                packets.close_all(fds)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._fail(f"the peer is gone: {error.strerror}")
        self._loop.remove_writer(self._sock)

    def close(self) -> None:
        """Forget what waits. The socket is the owner's to close, afterwards."""
        if self._is_closed:
            return
        with self.lock:  # afterwards no thread sends on what may be another socket's number
            self._is_closed = True
        self._loop.remove_writer(self._sock)
        while self._waiting:
            packets.close_all(self._waiting.popleft()[1])
