# SPDX-License-Identifier: Apache-2.0
"""A lane's socket for threads: packets out at once, packets in by whoever has the lead.

The socket stays in blocking mode, so that reading without a deadline is one system call; where
nothing may block, the call itself says so. It is closed when nobody is using it any more: another
thread could otherwise send into whatever was given its number.
"""

import contextlib
import io
import os
import select
import socket
import time
from collections import deque

from google.protobuf.message import DecodeError

from thirdrail.lane import packets
from thirdrail.lane.busy_poll import LONGEST_US, BusyWindow
from thirdrail.lane.turns import WAIT_S_MAX
from thirdrail.v1 import lane_pb2

Received = tuple[lane_pb2.LaneResponse, list[int]]  # the descriptors are the receiver's to close

_AT_ONCE = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class LaneBroken(Exception):
    """The worker is gone, or broke the lane's rules. The text says which."""


class BlockingWire:
    """Takes over a connected SOCK_SEQPACKET socket. `receive` is for one thread at a time.

    busy_poll_us: how long `receive` looks at most before it sleeps.
    """

    def __init__(self, sock: socket.socket, *, busy_poll_us: int = LONGEST_US) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._fd = sock.fileno()
        self._readable = select.poll()
        self._readable.register(self._fd, select.POLLIN)
        # Rings for who looks out. A file: closing one twice closes nobody else's.
        self._bell = io.FileIO(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "r+")
        self._news = select.poll()
        for fd in (self._fd, self._bell.fileno()):
            self._news.register(fd, select.POLLIN)
        self._window = BusyWindow(busy_poll_us)
        # One entry for each thread that uses the socket. A deque's operations are atomic, which
        # spares a lock on the way of every packet.
        self._users: deque[None] = deque()
        self._is_closed = False

    def send(self, packet: bytes, deadline_s: float | None) -> bool:
        """False: the worker took nothing until the deadline. Raises LaneBroken.

        A packet that was not sent is not known to the worker.
        """
        self._users.append(None)
        try:
            if self._is_closed:
                raise LaneBroken("the lane was closed")
            try:
                self._sock.send(packet, _AT_ONCE)
            except BlockingIOError:
                return self._send_later(packet, deadline_s)
        except OSError as error:
            raise LaneBroken(f"the worker is gone: {error.strerror}") from None
        finally:
            self._leave()
        return True

    def receive(self, packet_bytes_max: int, deadline_s: float | None) -> Received | None:
        """The next packet; None: the deadline passed first. Raises LaneBroken at the lane's end."""
        self._users.append(None)
        try:
            if self._is_closed:
                raise LaneBroken("the lane was closed")
            started_ns = time.perf_counter_ns()
            if not self._await_packet(started_ns, deadline_s):
                return None
            packet, fds = packets.receive_with_fds(self._sock, packet_bytes_max)
            if deadline_s != 0:
                now_ns = time.perf_counter_ns()
                self._window.waited(now_ns - started_ns, now_ns)
        except OSError as error:
            raise LaneBroken(f"the worker is gone: {error.strerror}") from None
        except packets.PacketTooLarge as error:
            raise LaneBroken(f"the worker broke the lane's rules: {error}") from None
        finally:
            self._leave()
        if not packet:
            raise LaneBroken("the worker is gone")
        try:
            return lane_pb2.LaneResponse.FromString(packet), fds
        except DecodeError:
            packets.close_all(fds)
            raise LaneBroken(
                "the worker broke the lane's rules: a packet is no LaneResponse"
            ) from None

    def look_out(self, deadline_s: float | None) -> bool:
        """Until there is something to receive, or another thread rings; for one thread at a time.

        False: the deadline passed first, or the lane was closed.
        """
        self._users.append(None)
        try:
            if self._is_closed:
                return False
            started_ns = time.perf_counter_ns()
            if not self._looked(self._news, started_ns, deadline_s) and not self._news.poll(
                _milliseconds_until(deadline_s)
            ):
                return False
            now_ns = time.perf_counter_ns()
            self._window.waited(now_ns - started_ns, now_ns)
            with contextlib.suppress(BlockingIOError):  # nobody rang
                os.eventfd_read(self._bell.fileno())
            return True
        finally:
            self._leave()

    def ring(self) -> None:
        """Whoever looks out has a look at something else."""
        self._users.append(None)
        try:
            if not self._is_closed:
                os.eventfd_write(self._bell.fileno(), 1)
        finally:
            self._leave()

    def close(self) -> None:
        """Hang up. Whoever is reading or sending finds out."""
        if self._is_closed:
            return
        self._users.append(None)
        self._is_closed = True
        with contextlib.suppress(OSError):  # the worker was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._leave()

    def forget(self) -> None:
        """In a forked child: close what was inherited, without a word to the worker."""
        self._is_closed = True
        self._close()

    def _await_packet(self, started_ns: int, deadline_s: float | None) -> bool:
        """False: none came until the deadline. Without one, it may be yet to come."""
        return (
            self._looked(self._readable, started_ns, deadline_s)
            or deadline_s is None
            or bool(self._readable.poll(_milliseconds_until(deadline_s)))
        )

    def _looked(self, poll: select.poll, started_ns: int, deadline_s: float | None) -> bool:
        """Whether something came while it was worth looking."""
        may_look = deadline_s != 0 and self._window.ns
        return bool(may_look and self._window.look(poll.poll, started_ns))

    def _send_later(self, packet: bytes, deadline_s: float | None) -> bool:
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        while writable.poll(_milliseconds_until(deadline_s)):
            with contextlib.suppress(BlockingIOError):  # another thread was faster
                self._sock.send(packet, _AT_ONCE)
                return True
        return False

    def _leave(self) -> None:
        self._users.pop()
        if self._is_closed and not self._users:
            self._close()

    def _close(self) -> None:
        self._sock.close()
        self._bell.close()


def _milliseconds_until(deadline_s: float | None) -> float:
    """As poll(2) takes them, which rounds up; -1 for ever."""
    if deadline_s is None:
        return -1
    if not deadline_s:
        return 0  # just look
    return min(max(0.0, deadline_s - time.monotonic()), WAIT_S_MAX) * 1000
