# SPDX-License-Identifier: Apache-2.0
"""Making the pages of memory before it is used, while other threads run.

Shared memory has pages of 4 KiB on nearly every host, since `shmem_enabled` is "never" unless
somebody changes it. MADV_COLLAPSE makes pages of 2 MiB of it all the same: it is independent of
that setting, says madvise(2). They are made ten times as fast, given back sixty times as fast,
mapped by another process at once, and a processor walks fewer tables for them.
"""

import ctypes
import errno
import functools
import mmap
import os
import time
from typing import Any

import numpy as np

HUGE_PAGE_BYTES = 2 << 20
# For all of one mapping. One takes 0.1 ms, or less; 5 ms where a virtual machine's host has yet to
# find the memory, and any time where the kernel tidies up memory to have 2 MiB in one piece.
HUGE_PAGES_S_MAX = 0.1

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, since Linux 5.14
_MADV_COLLAPSE = 25  # the same, since Linux 6.1
_MAP_FIXED = 0x10  # linux/mman.h; the mmap module has no names for these two
_MAP_NORESERVE = 0x4000


def map_shared(fd: int, size: int, prot: int) -> mmap.mmap:
    """The file's first `size` bytes, of memory that `make_huge_pages` may have made.

    Huge pages are mapped as such at multiples of their size. The kernel has chosen such an address
    for anonymous memory since Linux 6.7, but not for files, and Python cannot ask for one: so a
    file of whole huge pages is mapped over anonymous memory. Elsewhere, and others, are mapped
    anywhere, which costs speed only.
    Raises OSError.
    """
    mapping = _room_for_huge_pages(size, prot)
    if mapping is None:
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot)
    address = _address(mapping)
    if _c_library().mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        raise _last_error()
    return mapping


def make_huge_pages(mapping: mmap.mmap) -> None:
    """Have as much of it made of pages of 2 MiB as the host will quickly give. It comes from
    `map_shared` and has no pages yet.
    """
    address, size = _address(mapping), len(mapping)
    if address % HUGE_PAGE_BYTES or size % HUGE_PAGE_BYTES:
        return
    ends_s = time.monotonic() + HUGE_PAGES_S_MAX
    for piece in range(address, address + size, HUGE_PAGE_BYTES):
        # Where there is no page at all, there is nothing to make a larger one of.
        _c_library().madvise(piece, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
        if _c_library().madvise(piece, HUGE_PAGE_BYTES, _MADV_COLLAPSE):
            return  # an older kernel, or no such piece left
        if time.monotonic() > ends_s:
            return


def make_pages(mapping: mmap.mmap, start: int = 0, size: int | None = None) -> bool:
    """Have the pages made and mapped of `size` bytes (None: all) from `start`, a page's begin.

    By a foreign call, for which Python lets go of the GIL: it holds it in `mmap.madvise`, and
    before 3.13 also in `mmap.mmap`, however long MAP_POPULATE takes (0.3 s for 256 MiB).
    Returns whether they are there: a kernel before 5.14 makes them as they are first touched.
    Raises OSError where the host has no memory left.
    """
    length = len(mapping) - start if size is None else size
    while _c_library().madvise(_address(mapping) + start, length, _MADV_POPULATE_WRITE):
        error = ctypes.get_errno()
        if error == errno.EINVAL:
            return False
        if error != errno.EINTR:
            raise _last_error()
    return True


def _room_for_huge_pages(size: int, prot: int) -> mmap.mmap | None:
    """Anonymous memory to be mapped over. None: there is none, or none at such an address; for this
    moment it counts as private memory, of which a process, or a host, may be allowed less.
    """
    if not size or size % HUGE_PAGE_BYTES:
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, size, flags=flags, prot=prot)
    except OSError:
        return None
    return mapping if _address(mapping) % HUGE_PAGE_BYTES == 0 else None


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])


def _last_error() -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error))


@functools.cache
def _c_library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    return library
