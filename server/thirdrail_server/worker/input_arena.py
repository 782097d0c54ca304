# SPDX-License-Identifier: Apache-2.0
"""Memory of a session that its client writes.

The client decides what lies where; here its references are only checked and turned into views.
"""

import mmap

import numpy as np

from thirdrail.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import (
    Bytes,
    Charge,
    NewChunk,
    charge_nothing,
    charged_chunk_bytes,
    new_epoch,
)


class InputArena:
    """charge: makes room for a chunk in the books of all sessions. It is called on any thread."""

    def __init__(self, bytes_max: int, charge: Charge = charge_nothing) -> None:
        self.epoch = new_epoch()
        self.total_bytes = 0  # also after `close`: until it is unmapped
        self._bytes_max = bytes_max
        self._charge = charge
        self._chunks: list[mmap.mmap] = []

    def grow(self, size: int) -> NewChunk:
        """One more chunk with room for `size` bytes. Raises ResourceExhausted at a bound, OSError
        where the host has no memory. Takes long for large chunks: call it off the loop.
        """
        chunk_bytes = charged_chunk_bytes(size, self.total_bytes, self._bytes_max, self._charge)
        if chunk_bytes is None:
            raise ResourceExhausted(
                f"{size} more bytes of input memory were asked for, {self.total_bytes} of "
                f"{self._bytes_max} are in use"
            )
        try:
            fd, mapping = create_chunk(chunk_bytes, client_writes=True)
        except BaseException:
            self._charge(-chunk_bytes)
            raise
        self.total_bytes += chunk_bytes
        self._chunks.append(mapping)
        number = len(self._chunks) - 1
        message = lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_INPUT, epoch=self.epoch, chunk=number, size=chunk_bytes
        )
        return NewChunk(message, fd)

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to.

        Raises FailedPrecondition for another epoch, InvalidArgument for a place outside the chunk.
        """
        if ref.epoch != self.epoch:
            raise FailedPrecondition(
                f"tensor '{name}' refers to epoch {ref.epoch}, this session's input arena is "
                f"{self.epoch}"
            )
        if ref.chunk >= len(self._chunks):
            raise InvalidArgument(
                f"tensor '{name}' refers to chunk {ref.chunk} of {len(self._chunks)}"
            )
        chunk = self._chunks[ref.chunk]
        if ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > len(chunk):
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} of a "
                f"chunk of {len(chunk)}; offsets are multiples of {ALIGNMENT_BYTES}"
            )
        return np.frombuffer(chunk, np.uint8, ref.size, ref.offset)

    def close(self) -> list[mmap.mmap]:
        """Let go of the memory; what a request still reads lives as long as its view. The mappings
        are the caller's to unmap."""
        chunks, self._chunks = self._chunks, []
        return chunks
