# SPDX-License-Identifier: Apache-2.0
"""Memory that holds one tensor and nothing else, so that its descriptor may go to another
process."""

import contextlib
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thirdrail.lane.memory import create_chunk, seal_for_readers, whole_pages


@dataclass(slots=True, eq=False)
class TensorMemory:
    """The worker's hold on it: a descriptor and a mapping, from the tensor's first byte on.

    Never used for anything else afterwards. Not closed by garbage collection: `close` it.
    """

    fd: int
    mapping: mmap.mmap

    def __len__(self) -> int:
        return len(self.mapping)

    def close(self) -> None:
        """Let go of it; what a request still reads lives as long as its view. Unmapping takes
        long for large memory: call it off the loop.
        """
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # then it goes with the last view
            self.mapping.close()


def memory_for_client(size: int) -> TensorMemory:
    """For one tensor of `size` bytes, which a client will write. Raises OSError where the host has
    no memory left. Takes long for large ones: call it off the loop.
    """
    return TensorMemory(*create_chunk(whole_pages(size), client_writes=True, alone=True))


def copy_of(source: npt.NDArray[np.uint8]) -> TensorMemory:
    """A tensor's bytes in memory of their own, which nobody but the worker can write. As above."""
    memory = TensorMemory(*create_chunk(whole_pages(len(source)), client_writes=False))
    np.copyto(np.frombuffer(memory.mapping, np.uint8, len(source)), source)
    return memory


def forbid_writing(memory: TensorMemory) -> bool:
    """Whether it is certain that nobody can map it writable from now on."""
    try:
        seal_for_readers(memory.fd)
    except PermissionError:
        return False
    return True
