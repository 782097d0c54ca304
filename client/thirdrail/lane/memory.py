# SPDX-License-Identifier: Apache-2.0
"""Shared memory of the lane: sealed memfds, which have no name, cannot be shrunk and die with their
users.

The worker makes every chunk. The seals SHRINK and GROW keep anybody from truncating memory that
another process reads (a SIGBUS, which Python cannot catch). FUTURE_WRITE on output chunks leaves
the worker's own mapping writable and lets every later one only read (memfd_create(2), fcntl(2)
F_ADD_SEALS).

A chunk that holds one tensor alone gets that last seal later, when the tensor is handed to another
process: its maker's mapping stays as it is, the other process can only read.
"""

import fcntl
import mmap
import os

from thirdrail.pages import HUGE_PAGE_BYTES, make_huge_pages, make_pages, map_shared

_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE = (
    0x0010  # linux/fcntl.h; the fcntl module has no name for it before Python 3.13
)
_READERS_ONLY = _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def whole_pages(size: int) -> int:
    """The bytes of the memory that a tensor of `size` bytes has alone: never none.

    Pages of 2 MiB, where they are at most an eighth more than those that the system has.
    """
    needed = _rounded_up(max(size, 1), mmap.PAGESIZE)
    huge = _rounded_up(needed, HUGE_PAGE_BYTES)
    return huge if huge - needed <= needed // 8 else needed


def create_chunk(
    size: int, *, client_writes: bool, alone: bool = False, huge_pages: bool = False
) -> tuple[int, mmap.mmap]:
    """A new chunk of `size` bytes: its file descriptor, the caller's to close, and a writable
    mapping.

    alone: it will hold one tensor, which `seal_for_readers` may get later.
    huge_pages: of those of 2 MiB that the host has set aside; `size` is a multiple of that.

    All pages are there on return, of 2 MiB as far as the host gives them; making them takes 0.05 ms
    per MiB, or 0.7 for those of 4 KiB, in which other threads run, so call it off the loop for
    large chunks. Raises OSError where the host has no memory left.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_pages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("thirdrail", flags)
    try:
        os.ftruncate(fd, size)
        mapping = map_shared(fd, size, mmap.PROT_READ | mmap.PROT_WRITE)
        if not huge_pages:
            make_huge_pages(mapping)
        if not make_pages(mapping):
            os.posix_fallocate(fd, 0, size)
        seals = _SEALED if client_writes else _SEALED | _F_SEAL_FUTURE_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals if alone else seals | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd, mapping


def seal_for_readers(fd: int) -> None:
    """From now on nobody can map the chunk writable, or write it through a descriptor.

    Mappings that exist stay as they are. Raises PermissionError where a client, who may add seals
    to a chunk of its own as well, has forbidden this one.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _READERS_ONLY == _READERS_ONLY:
        return
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _READERS_ONLY)


def map_chunk(fd: int, size: int, *, writable: bool) -> mmap.mmap:
    """Map a chunk that came from the worker, and close `fd`.

    Raises ValueError for memory that is not what a worker hands out: not sealed, or of another
    size.
    """
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALED != _SEALED:
            raise ValueError("the chunk is not sealed against truncation")
        if os.fstat(fd).st_size != size:
            raise ValueError(f"the chunk has {os.fstat(fd).st_size} bytes, announced were {size}")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return map_shared(fd, size, access)
    finally:
        os.close(fd)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step
