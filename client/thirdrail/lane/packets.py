# SPDX-License-Identifier: Apache-2.0
"""One message, one packet: sending and receiving on a SOCK_SEQPACKET socket, file descriptors
included."""

import array
import os
import socket
from collections.abc import Iterable, Sequence

FDS_PER_PACKET_MAX = 4
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(FDS_PER_PACKET_MAX * _FD_BYTES)
# A plain number: the same with the enum's members takes a microsecond for each packet.
_TRUNCATED = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)


class PacketTooLarge(Exception):
    """A packet exceeds the agreed size, or carries more than was agreed."""


def send(sock: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet. Raises BlockingIOError where the queue is full, OSError without a peer."""
    assert packet, "an empty packet reads as end of file"
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sock.sendmsg([packet], [rights])
    else:
        sock.send(packet)


def receive(sock: socket.socket, size_max: int) -> bytes:
    """The next packet, b"" at end of file.

    For the side that is sent no file descriptors: any that come are closed by the kernel, since no
    room is offered for them. Raises PacketTooLarge for a longer packet or for one with descriptors,
    BlockingIOError when there is none.
    """
    try:
        data, _, flags, _ = sock.recvmsg(size_max)
    except ConnectionResetError:  # see receive_with_fds
        data, _, flags, _ = sock.recvmsg(size_max)
    if flags & _TRUNCATED:
        raise PacketTooLarge(f"a packet of more than {size_max} bytes, or with file descriptors")
    return data


def receive_with_fds(sock: socket.socket, size_max: int) -> tuple[bytes, list[int]]:
    """The next packet and its file descriptors, which are the caller's to close.

    Raises PacketTooLarge, with nothing left open, for a longer packet or too many descriptors.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(size_max, _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
    except ConnectionResetError:
        # A peer that hung up without reading all of ours: told once, before its own last words.
        data, ancillary, flags, _ = sock.recvmsg(size_max, _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
    if not ancillary and not flags & _TRUNCATED:
        return data, []
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    if flags & _TRUNCATED:
        close_all(fds)
        raise PacketTooLarge(f"a packet of more than {size_max} bytes or {len(fds)} descriptors")
    return data, list(fds)


def sole_fd(fds: Sequence[int]) -> int:
    """The one that came. Raises ValueError, with nothing left open, for none or more."""
    if len(fds) != 1:
        close_all(fds)
        raise ValueError(f"expected 1 file descriptor, got {len(fds)}")
    return fds[0]


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def varint(value: int) -> bytes:
    """Protobuf's variable-length form of a number that is not negative."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
