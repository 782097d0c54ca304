# SPDX-License-Identifier: Apache-2.0
"""Locks between threads and processes: flock(2) on files and folders.

The kernel drops such a lock when its last open description closes, so nothing has to be cleaned up
after a kill -9. The descriptions close on exec and belong to one holder each, which makes two
threads of a process exclude each other just as two processes do.

A lock's file is removed by who holds it, so that none is left over. Who gets the lock of a removed
file notices that the name means another file now, and tries again.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = 0.02
_EVICTION_S_MAX = 1.0  # that an entry is locked by who tries to evict it; takes milliseconds
_OPEN_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LockTimeout(Exception):
    """Somebody else kept the lock for too long."""


@contextmanager
def locked_file(
    path: Path,
    *,
    cancelled: threading.Event | None = None,
    waiting: Callable[[str], None] | None = None,
    wait_s_max: float | None = None,
) -> Iterator[bool]:
    """Hold the lock whose file is at `path`; the file is there only meanwhile.

    waiting: called once, if somebody else has it, with that process's id as text.
    Yields False, without the lock, once `cancelled` is set while waiting. Raises LockTimeout after
    `wait_s_max`, OSError where the file cannot be made.
    """
    cancelled = cancelled or threading.Event()
    ends = None if wait_s_max is None else time.monotonic() + wait_s_max
    while (fd := _try_lock(path)) is None:
        if waiting is not None:
            waiting(_holder(path))
            waiting = None
        if cancelled.wait(_POLL_S):
            yield False
            return
        if ends is not None and time.monotonic() > ends:
            raise LockTimeout(f"process {_holder(path)} has kept {path} locked")
    try:
        yield True
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)


def open_folder(path: Path | str) -> int:
    """The folder itself, never what a link points to. Raises OSError."""
    return os.open(path, _OPEN_FOLDER)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True


def lock_to_read(fd: int) -> None:
    """Share the lock of an entry's folder. Who has it otherwise evicts the entry, and is quick.

    Raises FileNotFoundError if not: the entry is as good as gone.
    """
    ends = time.monotonic() + _EVICTION_S_MAX
    while not try_lock(fd, shared=True):
        if time.monotonic() > ends:
            raise FileNotFoundError
        time.sleep(0.001)


def is_still_at(path: Path, fd: int) -> bool:
    """Whether `path` names the very file that is open as `fd`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _try_lock(path: Path) -> int | None:
    """The open file, locked and still named `path`; None if somebody else has it."""
    fd = os.open(path, _OPEN_FILE, 0o644)
    try:
        if try_lock(fd) and is_still_at(path, fd):
            with contextlib.suppress(OSError):  # on a full disk nobody is told who has it
                os.ftruncate(fd, 0)
                os.write(fd, b"%d\n" % os.getpid())
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _holder(path: Path) -> str:
    try:
        text = path.read_bytes()[:20].strip().decode("ascii", "replace")
    except OSError:
        text = ""
    return text if text.isdigit() else "?"
