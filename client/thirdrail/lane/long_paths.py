# SPDX-License-Identifier: Apache-2.0
"""Unix sockets at paths of any length: an address takes at most 107 bytes (unix(7), sun_path)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ADDRESS_BYTES_MAX = 107


@contextlib.contextmanager
def socket_address(path: str | os.PathLike[str]) -> Iterator[str]:
    """What to bind or connect to for a path: itself, or its name in its folder as /proc shows it.

    Raises OSError where the folder cannot be opened.
    """
    whole = os.fspath(path)
    if len(os.fsencode(whole)) <= ADDRESS_BYTES_MAX:
        yield whole
        return
    folder = os.open(Path(whole).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{Path(whole).name}"
    finally:
        os.close(folder)
