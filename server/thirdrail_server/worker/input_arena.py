# SPDX-License-Identifier: Apache-2.0
"""Memory of a session that its client writes.

The client decides what lies where; here its references are only checked and turned into views. A
chunk that was asked for alone has one tensor and a descriptor that we keep, so that the tensor can
be exported. From then on it belongs to the books of exports.
"""

import mmap
import os
import threading

import numpy as np

from thirdrail.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.lane.memory import create_chunk, whole_pages
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker.chunks import (
    Bytes,
    Charge,
    MakeChunk,
    NewChunk,
    charge_nothing,
    charged_chunk_bytes,
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
        self.total_bytes = 0  # also after `close`: until it is unmapped
        self._bytes_max = bytes_max
        self._charge = charge
        self._alone_chunks_max = alone_chunks_max
        self._make_chunk = make_chunk
        self._lock = threading.Lock()  # memory is made on another thread than it is given back
        self._made = 0  # chunks so far
        self._chunks: dict[int, mmap.mmap] = {}  # without those given back
        self._alone: dict[int, TensorMemory] = {}  # by chunk
        self._exported: set[int] = set()  # of these; charged for and let go by others

    def grow(self, size: int, *, is_alone: bool = False) -> NewChunk:
        """One more chunk with room for `size` bytes. Raises ResourceExhausted at a bound, OSError
        where the host has no memory. Takes long for large chunks: call it off the loop.

        is_alone: for one tensor of exactly this size.
        """
        if is_alone:
            return self._grow_alone(size)
        chunk_bytes = charged_chunk_bytes(size, self.total_bytes, self._bytes_max, self._charge)
        if chunk_bytes is None:
            raise self._full(size)
        try:
            fd, mapping = self._make_chunk(chunk_bytes, client_writes=True)
        except BaseException:
            self._charge(-chunk_bytes)
            raise
        return NewChunk(self._add(mapping), fd)

    def _grow_alone(self, size: int) -> NewChunk:
        if len(self._alone) >= self._alone_chunks_max:
            raise ResourceExhausted(
                f"this session has {len(self._alone)} tensors in memory of their own, the most it "
                "may"
            )
        chunk_bytes = whole_pages(size)
        if self.total_bytes + chunk_bytes > self._bytes_max:
            raise self._full(size)
        self._charge(chunk_bytes)
        try:
            memory = memory_for_client(size)
        except BaseException:
            self._charge(-chunk_bytes)
            raise
        fd = os.dup(memory.fd)
        message = self._add(memory.mapping)
        message.alone = True
        self._alone[message.chunk] = memory
        return NewChunk(message, fd)

    def _add(self, mapping: mmap.mmap) -> lane_pb2.Chunk:
        with self._lock:
            self.total_bytes += len(mapping)
            number = self._made
            self._chunks[number] = mapping
            self._made += 1
        return lane_pb2.Chunk(
            role=lane_pb2.ARENA_ROLE_INPUT, epoch=self.epoch, chunk=number, size=len(mapping)
        )

    def _full(self, size: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"{size} more bytes of input memory were asked for, {self.total_bytes} of "
            f"{self._bytes_max} are in use"
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
            self._uncharge(self._alone[chunk])

    def drop(self, chunk: int) -> TensorMemory | None:
        """The client gives a chunk back that it had asked for alone; unknown ones are ignored."""
        memory = self._alone.pop(chunk, None)
        if memory is None:
            return None
        del self._chunks[chunk]
        if chunk in self._exported:
            self._exported.remove(chunk)
        else:
            self._uncharge(memory)
        return memory

    def _uncharge(self, memory: TensorMemory) -> None:
        with self._lock:
            self.total_bytes -= len(memory)
        self._charge(-len(memory))

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
