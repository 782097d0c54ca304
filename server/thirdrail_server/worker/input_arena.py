# SPDX-License-Identifier: Apache-2.0
"""Memory of a session that its client writes.

The client decides what lies where; here its references are only checked and turned into views. A
chunk that was asked for alone has one tensor and a descriptor that we keep, so that the tensor can
be exported. From then on it belongs to the books of exports.
"""

import mmap
import os

import numpy as np

from thirdrail.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.lane.memory import create_chunk, whole_pages
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import (
    Budget,
    Bytes,
    Charge,
    Made,
    MakeChunk,
    NewChunk,
    charge_nothing,
    new_epoch,
)
from thirdrail_server.worker.tensor_memory import TensorMemory, memory_for_client


class InputArena:
    """charge: makes room for a chunk in the books of all sessions. It is called on any thread."""

    def __init__(
        self,
        bytes_max: int,
        charge: Charge = charge_nothing,
        alone_chunks_max: int = 0,
        make_chunk: MakeChunk = create_chunk,
    ) -> None:
        self.epoch = new_epoch()
        self._budget = Budget(bytes_max, charge)
        self._alone_chunks_max = alone_chunks_max
        self._make_chunk = make_chunk
        self._made = 0  # chunks so far
        self._chunks: dict[int, mmap.mmap] = {}  # without those given back
        self._alone: dict[int, TensorMemory] = {}  # by chunk
        self._exported: set[int] = set()  # of these; charged for and let go by others

    @property
    def total_bytes(self) -> int:
        """Also after `close`: until it is unmapped."""
        return self._budget.used_bytes

    def grow(self, size: int, *, is_alone: bool = False) -> NewChunk:
        """One more chunk with room for `size` bytes. Raises ResourceExhausted at a bound, OSError
        where the host has no memory. Takes long for large chunks: call it off the loop, one at a
        time.

        is_alone: for one tensor of exactly this size.
        """
        if is_alone:
            return self._grow_alone(size)
        made = self._budget.make(size, self._make)
        if made is None:
            raise self._full(size)
        return NewChunk(self._add(made.memory), made.fd)

    def _make(self, nbytes: int, _least: int) -> Made[mmap.mmap]:
        fd, mapping = self._make_chunk(nbytes, client_writes=True)
        return Made(mapping, nbytes, fd)

    def _grow_alone(self, size: int) -> NewChunk:
        if len(self._alone) >= self._alone_chunks_max:
            raise ResourceExhausted(
                f"this session has {len(self._alone)} tensors in memory of their own, the most it "
                "may"
            )
        chunk_bytes = whole_pages(size)
        if not self._budget.take(chunk_bytes):
            raise self._full(size)
        try:
            memory, fd = _memory_and_descriptor(size)
        except BaseException:
            self._budget.give_back(chunk_bytes)
            raise
        message = self._add(memory.mapping)
        message.alone = True
        self._alone[message.chunk] = memory
        return NewChunk(message, fd)

    def _add(self, mapping: mmap.mmap) -> lane_pb2.Chunk:
        number = self._made
        self._chunks[number] = mapping
        self._made += 1
        return lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_INPUT, epoch=self.epoch, chunk=number, size=len(mapping)
        )

    def _full(self, size: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"{size} more bytes of input memory were asked for, {self.total_bytes} of "
            f"{self._budget.bytes_max} are in use"
        )

    def view(self, name: str, ref: tensor_pb2.ArenaRef) -> Bytes:
        """The bytes that a request's tensor refers to.

        Raises FailedPrecondition for another epoch, InvalidArgument for a place outside the chunk.
        """
        if ref.epoch != self.epoch:
            raise FailedPrecondition(
                f"tensor '{name}' refers to epoch {ref.epoch}, this session's input arena is "
                f"{self.epoch}"
            )
        if ref.chunk >= self._made:
            raise InvalidArgument(f"tensor '{name}' refers to chunk {ref.chunk} of {self._made}")
        chunk = self._chunks.get(ref.chunk)
        if chunk is None:
            raise FailedPrecondition(f"tensor '{name}' refers to chunk {ref.chunk}, given back")
        if ref.offset % ALIGNMENT_BYTES or ref.offset + ref.size > len(chunk):
            raise InvalidArgument(
                f"tensor '{name}' refers to bytes {ref.offset} to {ref.offset + ref.size} of a "
                f"chunk of {len(chunk)}; offsets are multiples of {ALIGNMENT_BYTES}"
            )
        return np.frombuffer(chunk, np.uint8, ref.size, ref.offset)

    # Chunks with one tensor

    def alone(self, ref: tensor_pb2.ArenaRef) -> TensorMemory:
        """The memory that a tensor has to itself.

        Raises InvalidArgument where the reference is to anything else.
        """
        memory = self._alone.get(ref.chunk)
        if memory is None:
            raise InvalidArgument(
                f"chunk {ref.chunk} of the input arena can hold several tensors; only one that has "
                "a chunk to itself (GrowRequest.alone) can be exported"
            )
        if ref.offset or whole_pages(ref.size) != len(memory):
            raise InvalidArgument(
                f"chunk {ref.chunk} of {len(memory)} bytes is exported as the one tensor it was "
                f"made for; got {ref.size} bytes from {ref.offset} on"
            )
        return memory

    def on_exported(self, chunk: int) -> None:
        """The books of exports have a chunk now."""
        if chunk not in self._exported:
            self._exported.add(chunk)
            self._budget.give_back(len(self._alone[chunk]))

    def drop(self, chunk: int) -> TensorMemory | None:
        """The client gives a chunk back that it had asked for alone; unknown ones are ignored."""
        memory = self._alone.pop(chunk, None)
        if memory is None:
            return None
        del self._chunks[chunk]
        if chunk in self._exported:
            self._exported.remove(chunk)
        else:
            self._budget.give_back(len(memory))
        return memory

    def close(self) -> list[mmap.mmap]:
        """Let go of the memory; what a request still reads lives as long as its view. The mappings
        are the caller's to unmap; those of exported chunks are not among them."""
        chunks, self._chunks = self._chunks, {}
        alone, self._alone = self._alone, {}
        for number, memory in alone.items():
            if number in self._exported:
                del chunks[number]
            else:
                os.close(memory.fd)
        return list(chunks.values())


def _memory_and_descriptor(size: int) -> tuple[TensorMemory, int]:
    """For one tensor, and for the client to map it."""
    memory = memory_for_client(size)
    try:
        return memory, os.dup(memory.fd)
    except OSError:
        memory.close()
        raise
