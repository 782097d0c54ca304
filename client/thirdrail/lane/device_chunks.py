# SPDX-License-Identifier: Apache-2.0
"""A session's memory on the device, at the client's end: which chunks there are."""

import os
import weakref
from collections.abc import Callable
from functools import partial

from thirdrail.device.runtime import Memory, Runtime, open_runtime
from thirdrail.errors import Internal
from thirdrail.lane.allocator import ArenaAllocator
from thirdrail.v1 import lane_pb2, tensor_pb2

ALIGNMENT_BYTES = 256

Dispose = Callable[[Callable[[], None]], None]


class DeviceChunks:
    """Chunks are opened one after the other, as they come. The allocator is guarded by the lane's
    lock, or used on one event loop."""

    def __init__(
        self, attached: lane_pb2.DeviceAttached, runtime: Runtime, dispose: Dispose
    ) -> None:
        self.runtime = runtime
        self.input_epoch = attached.input_epoch
        self.output_epoch = attached.output_epoch
        self.allocator = ArenaAllocator()
        self._chunks: dict[int, list[Memory]] = {
            attached.input_epoch: [],
            attached.output_epoch: [],
        }
        # With the session and the last array over it; nobody looks at it when the process ends.
        close_all = partial(_close_all, self._chunks, runtime)
        weakref.finalize(self, dispose, close_all).atexit = False

    def takes(self, chunk: lane_pb2.Chunk) -> bool:
        return chunk.epoch in self._chunks

    def open(self, chunk: lane_pb2.Chunk, fd: int) -> None:
        """Map it; it may take a while. Closes `fd`.

        Raises ValueError, OSError, Internal for what cannot be used.
        """
        there = self._chunks[chunk.epoch]
        if chunk.chunk != len(there):
            os.close(fd)
            raise ValueError(f"chunk {chunk.chunk} came after {len(there)} others")
        there.append(self.runtime.open_memory(fd, chunk.size))

    def add_room(self, chunk: lane_pb2.Chunk) -> bool:
        """One that was opened. Whether it is input memory, which there is more of now."""
        if chunk.epoch != self.input_epoch:
            return False
        self.allocator.add_chunk(chunk.size)
        return True

    def allocate(self, size: int) -> tuple[int, int] | None:
        """(chunk, offset) of a piece of input memory; None where there is no room."""
        return self.allocator.allocate(whole(size))

    def address(self, epoch: int, chunk: int, offset: int) -> int:
        return self._chunks[epoch][chunk].address + offset

    def result_address(self, ref: tensor_pb2.ArenaRef) -> int:
        """Raises Internal for a place that the worker cannot mean."""
        there = self._chunks[self.output_epoch]
        if ref.chunk >= len(there) or ref.offset + ref.size > there[ref.chunk].nbytes:
            raise Internal("the worker referred to memory on the device outside its arena")
        return there[ref.chunk].address + ref.offset


def open_device(
    attached: lane_pb2.DeviceAttached, fds: list[int], dispose: Dispose = lambda work: work()
) -> DeviceChunks:
    """What the worker has given, without a chunk yet; it may take a while. Takes the descriptors
    over.

    dispose: runs what unmaps the memory, which waits for the device's work; told when it is let go
        of, in any thread.
    Raises FailedPrecondition for what this process lacks, Internal for what cannot be used.
    """
    try:
        return DeviceChunks(attached, open_runtime(attached, fds), dispose)
    except (ValueError, OSError) as error:
        raise Internal(f"the worker sent events that cannot be used: {error}") from None


def _close_all(chunks: dict[int, list[Memory]], runtime: Runtime) -> None:
    for memory in (memory for each in chunks.values() for memory in each):
        memory.close()
    runtime.close()


def whole(size: int) -> int:
    """A multiple of what the device wants, at least one."""
    return -(-max(size, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
