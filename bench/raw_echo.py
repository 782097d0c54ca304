# SPDX-License-Identifier: Apache-2.0
"""The floor under any lane in Python: a packet goes to another process and comes back."""

import contextlib
import multiprocessing
import socket
from collections.abc import Iterator

_SPAWN = multiprocessing.get_context("spawn")
_PACKET_BYTES_MAX = 1 << 16


@contextlib.contextmanager
def raw_echo() -> Iterator[socket.socket]:
    """One end of a SOCK_SEQPACKET pair; at the other a process in blocking `recv` and `send`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = _SPAWN.Process(target=_echo, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _echo(sock: socket.socket) -> None:
    while packet := sock.recv(_PACKET_BYTES_MAX):
        sock.send(packet)
