# SPDX-License-Identifier: Apache-2.0
"""Making the pages of memory before it is used, while other threads run."""

import ctypes
import errno
import functools
import mmap
import os
from typing import Any

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, since Linux 5.14


def make_pages(mapping: mmap.mmap, start: int = 0, size: int | None = None) -> bool:
    """Have the pages made and mapped of `size` bytes (None: all) from `start`, a page's begin.

    By a foreign call, for which Python lets go of the GIL: it holds it in `mmap.madvise`, and
    before 3.13 also in `mmap.mmap`, however long MAP_POPULATE takes (0.3 s for 256 MiB).
    Returns whether they are there: a kernel before 5.14 makes them as they are first touched.
    Raises OSError where the host has no memory left.
    """
    first = ctypes.c_char.from_buffer(mapping, start)
    length = len(mapping) - start if size is None else size
    while _madvise()(ctypes.addressof(first), length, _MADV_POPULATE_WRITE):
        error = ctypes.get_errno()
        if error == errno.EINVAL:
            return False
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


@functools.cache
def _madvise() -> Any:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
