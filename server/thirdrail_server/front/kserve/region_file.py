# SPDX-License-Identifier: Apache-2.0
"""A client's shared memory, as a file of /dev/shm that is read and written at places.

It is never mapped. Whoever truncates a file that another process has mapped kills that process
(SIGBUS); a read that meets the new end comes back short. A client may also try to make us open
what is not its own, or to hold us up, so what is opened is checked: a plain file in /dev/shm, no
link, of an owner who may give us memory.
"""

import errno
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from thirdrail.dtypes import Buffer
from thirdrail.errors import Internal, InvalidArgument, PermissionDenied, ResourceExhausted

_FOLDER = "/dev/shm"  # noqa: S108 - where the host's shm_open has its objects
_KEY = re.compile(r"/?([A-Za-z0-9._-]{1,200})")
# Triton's and our own names, and glibc's semaphores (sem_overview(7)), which others sleep on.
_RESERVED_PREFIXES = ("triton_python_backend_shm_region_", "thirdrail_", "sem.")

# Non-blocking: a client that holds a lease on its file (fcntl(2)) could stop us for 45 seconds.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def checked_key(name: str, key: str) -> str:
    """The file name that a key stands for. Raises InvalidArgument, which names the region."""
    stripped = key.lstrip("/")
    for prefix in _RESERVED_PREFIXES:
        if stripped.startswith(prefix):
            raise InvalidArgument(
                f"cannot register shared memory region '{name}' with key '{key}' as the key "
                f"contains the reserved prefix '{prefix}'"
            )
    matched = _KEY.fullmatch(key)
    if matched is None or stripped in (".", ".."):
        raise InvalidArgument(
            f"cannot register shared memory region '{name}' - invalid shm key '{key}'"
        )
    return matched[1]


def open_region(name: str, key: str, owners: Collection[int] | None) -> "RegionFile":
    """Open what the key stands for.

    owners: the user ids whose files may be opened; None: anybody's.
    Raises InvalidArgument, PermissionDenied, or Internal where there is nothing to open.
    """
    file_name = checked_key(name, key)
    try:
        fd = os.open(f"{_FOLDER}/{file_name}", _FLAGS)
    except OSError as error:
        raise Internal(f"Unable to open shared memory region: '{key}' ({error.strerror})") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgument(
                f"cannot register shared memory region '{name}': '{key}' is not a plain file"
            )
        if owners is not None and found.st_uid not in owners:
            raise PermissionDenied(
                f"cannot register shared memory region '{name}': '{key}' belongs to user "
                f"{found.st_uid}, expected {' or '.join(map(str, sorted(owners)))}"
            )
    except BaseException:
        os.close(fd)
        raise
    return RegionFile(fd)


class RegionFile:
    """An open file, for any thread. Closed when it is told to and nobody reads or writes it."""

    def __init__(self, fd: int) -> None:
        """Takes `fd` over."""
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 0
        self._is_closing = False

    @property
    def size(self) -> int:
        """In bytes, as the file is now."""
        with self._opened() as fd:
            return os.fstat(fd).st_size

    def read(self, offset: int, target: memoryview) -> int:
        """Fill `target`. Returns how many bytes there were: fewer where the file ends before.

        Raises InvalidArgument when the file cannot be read.
        """
        done = 0
        with self._opened() as fd, _failures("read"):
            while done < target.nbytes:
                count = os.preadv(fd, [target[done:]], offset + done)
                if not count:
                    break
                done += count
        return done

    def write(self, offset: int, source: Buffer) -> None:
        """Write all of `source`. It makes the file longer where that ends before.

        Raises InvalidArgument when the file cannot be written, ResourceExhausted when the host has
        no memory for it.
        """
        view = memoryview(source)
        done = 0
        with self._opened() as fd, _failures("written"):
            while done < view.nbytes:
                done += os.pwritev(fd, [view[done:]], offset + done)

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            self._close_if_due()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with self._lock:
            if self._is_closing:
                raise InvalidArgument("the shared memory region was unregistered meanwhile")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_due()

    def _close_if_due(self) -> None:
        if self._is_closing and not self._users and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def _failures(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"the shared memory region cannot be {done}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            raise ResourceExhausted(text) from None
        raise InvalidArgument(text) from None
