# SPDX-License-Identifier: Apache-2.0
"""The place of a Unix socket: whether a server has it, and taking it over from one that is gone."""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from thirdrail.lane.long_paths import socket_address
from thirdrail_server.config import ConfigError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Servers that start at the same time look and bind one after the other."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def bound_with(mode: int) -> Iterator[None]:
    """Sockets that are bound inside have this file mode."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def is_answered(path: Path, kind: socket.SocketKind) -> bool:
    """Whether a process listens there, also one that answers nobody. Raises OSError."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            with socket_address(path) as address:
                probe.connect(address)
        except BlockingIOError:
            return True  # more wait there than its queue takes
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def remove_left(path: Path) -> None:
    """Remove the socket that a server has left behind, and nothing else.

    Raises ConfigError for what is no socket, OSError.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
        raise ConfigError(f"'{path}' is no socket, and stays: choose another --socket")
    path.unlink(missing_ok=True)
