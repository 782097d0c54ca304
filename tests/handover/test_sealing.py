# SPDX-License-Identifier: Apache-2.0
"""What the kernel promises about memory that goes to another process: it can be read, no more."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from thirdrail.lane.memory import map_chunk
from thirdrail_server.worker.tensor_memory import (
    TensorMemory,
    copy_of,
    forbid_writing,
    memory_for_client,
)

SIZE = 1 << 16
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
FALLOC_PUNCH_HOLE = 0x02 | 0x01  # with FALLOC_FL_KEEP_SIZE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@pytest.fixture(params=["a client's", "a copy"])
def memory(request: pytest.FixtureRequest) -> Iterator[TensorMemory]:
    """Memory that was made ready for another process."""
    if request.param == "a copy":
        made = copy_of(np.full(SIZE, 7, np.uint8))
    else:
        made = memory_for_client(SIZE)
        made.mapping[:] = b"\x07" * SIZE
    assert forbid_writing(made)
    yield made
    made.close()


def test_the_makers_own_mapping_stays_writable() -> None:
    memory = memory_for_client(SIZE)
    theirs = map_chunk(os.dup(memory.fd), SIZE, writable=True)  # the exporting client
    assert forbid_writing(memory)
    readers = map_chunk(os.dup(memory.fd), SIZE, writable=False)
    theirs[:3] = b"abc"
    assert readers[:3] == b"abc"
    assert memory.mapping[:3] == b"abc"
    memory.close()


def test_another_process_can_map_it_only_to_read(memory: TensorMemory) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, SIZE)
    readers = map_chunk(os.dup(memory.fd), SIZE, writable=False)
    assert readers[:] == b"\x07" * SIZE
    with pytest.raises(TypeError):
        readers[:1] = b"x"


def test_a_read_only_mapping_cannot_be_made_writable(memory: TensorMemory) -> None:
    address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, memory.fd, 0)
    try:
        assert libc.mprotect(address, SIZE, PROT_READ_WRITE) == -1
    finally:
        libc.munmap(address, SIZE)


def test_reopening_the_descriptor_gives_no_more(memory: TensorMemory) -> None:
    again = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, SIZE)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
    finally:
        os.close(again)


def test_it_cannot_be_emptied_or_resized_or_sealed_further(memory: TensorMemory) -> None:
    assert libc.fallocate(memory.fd, FALLOC_PUNCH_HOLE, 0, mmap.PAGESIZE) == -1
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert memory.mapping[:] == b"\x07" * SIZE


def test_memory_can_be_made_ready_twice() -> None:
    memory = memory_for_client(SIZE)
    assert forbid_writing(memory)
    assert forbid_writing(memory)
    memory.close()


def test_a_client_that_forbids_the_seal_is_noticed() -> None:
    memory = memory_for_client(SIZE)
    fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    assert not forbid_writing(memory)
    memory.close()


def test_memory_of_its_own_is_whole_pages() -> None:
    memory = memory_for_client(mmap.PAGESIZE + 1)
    assert len(memory) == 2 * mmap.PAGESIZE
    memory.close()
    empty = copy_of(np.zeros(0, np.uint8))
    assert len(empty) == mmap.PAGESIZE
    empty.close()


def test_closing_leaves_views_readable() -> None:
    memory = copy_of(np.full(SIZE, 7, np.uint8))
    view = np.frombuffer(memory.mapping, np.uint8)
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory.fd)
    assert (view == 7).all()
