# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a connected Unix socket, as the kernel says.

A descriptor of the process tells for certain when it has ended: its number could be another
process's by then, and no end of file comes while a forked child still has the socket.
"""

import contextlib
import os
import socket
import struct
from dataclasses import dataclass

_SO_PEERPIDFD = 77  # Linux 6.5; the socket module has no name for it
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid; the pid of whoever connected
_UID_MASK = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Peer:
    """pidfd: readable once the process has ended, its owner's to close; None: there is none."""

    pid: int  # 0: in a PID namespace that we cannot see into
    uid: int
    pidfd: int | None = None

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}"


def credentials_of(sock: socket.socket) -> Peer:
    """Without a descriptor. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid & _UID_MASK)


def peer_of(sock: socket.socket) -> Peer:
    """With a descriptor, where the kernel gives one. Raises OSError when the peer is not known."""
    peer = credentials_of(sock)
    return Peer(peer.pid, peer.uid, _pidfd_of(sock, peer.pid))


def _pidfd_of(sock: socket.socket, pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    if pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return None
