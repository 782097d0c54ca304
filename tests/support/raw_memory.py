# SPDX-License-Identifier: Apache-2.0
"""Memory of the lane as a client has it that means no good: its descriptor, and what the kernel
lets it try.
"""

import ctypes
import os
import socket

from support.lane_peer import PACKET_BYTES_MAX, LanePeer, Request, Response
from thirdrail.v1 import lane_pb2, tensor_pb2

MIB = 1 << 20
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h

libc = ctypes.CDLL(None, use_errno=True)


def receive_memory(peer: LanePeer) -> tuple[lane_pb2.Chunk, int]:
    """The next chunk and its descriptor, which nobody has mapped here."""
    while True:
        packet, fds, _, _ = socket.recv_fds(peer.sock, PACKET_BYTES_MAX, 4)
        response = Response.FromString(packet)
        if response.WhichOneof("message") == "chunk":
            (fd,) = fds
            return response.chunk, fd


def input_memory(peer: LanePeer, size: int = MIB) -> tuple[lane_pb2.Chunk, int]:
    peer.send(Request(grow=lane_pb2.GrowRequest(size=size)))
    return receive_memory(peer)


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def punch_hole(fd: int, offset: int, size: int) -> None:
    flags = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    checked(libc.fallocate(fd, flags, ctypes.c_long(offset), ctypes.c_long(size)))


def whole(chunk: lane_pb2.Chunk) -> tensor_pb2.ArenaRef:
    return tensor_pb2.ArenaRef(epoch=chunk.epoch, chunk=chunk.chunk, size=chunk.size)
