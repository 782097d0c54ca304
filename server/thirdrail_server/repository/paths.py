# SPDX-License-Identifier: Apache-2.0
"""Paths that stay inside a folder, and file reads that end; folders that not everybody may write.

Whoever fills a repository is trusted less than the server: a model folder must not make the server
read /etc/shadow by a symlink or `..`, nor hang on a FIFO, nor fill the memory.
"""

import os
import shlex
import stat
from pathlib import Path

from thirdrail_server.repository.errors import RepositoryError

RELATIVE_CHARS_MAX = 1024


def relative_parts(relative: str, what: str) -> tuple[str, ...]:
    """The parts of a relative path from a configuration or an upload: ("1", "model.onnx").

    Raises RepositoryError when it is empty, too long, absolute, or climbs with `..`.
    """
    if not relative or len(relative) > RELATIVE_CHARS_MAX or not relative.isprintable():
        raise RepositoryError(
            f"{what} must be a printable path of 1 to {RELATIVE_CHARS_MAX} characters, "
            f"got {_shown(relative)}"
        )
    parts = tuple(part for part in relative.split("/") if part not in ("", "."))
    if relative.startswith("/") or ".." in parts or not parts:
        raise RepositoryError(
            f"{what} must be a path inside the model's folder, got {_shown(relative)}"
        )
    return parts


def resolve_inside(boundary: Path, folder: Path, relative: str, what: str) -> Path:
    """The real path of the existing `folder/relative`, all symlinks followed.

    Raises RepositoryError when it does not exist, or lies outside `boundary` (itself a real path).
    """
    path = folder.joinpath(*relative_parts(relative, what))
    try:
        real = Path(os.path.realpath(path, strict=True))
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{what} {_shown(relative)}: {reason_of(error)}") from None
    if not real.is_relative_to(boundary):
        raise RepositoryError(
            f"{what} {_shown(relative)} leads out of the folder '{boundary.name}'"
        )
    return real


def read_bounded(path: Path, bytes_max: int, what: str) -> bytes:
    """The content of a regular file of at most `bytes_max` bytes. Raises RepositoryError."""
    try:
        data = _read_regular(path, bytes_max + 1)
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{what} cannot be read: {reason_of(error)}") from None
    if data is None:
        raise RepositoryError(f"{what} is not a regular file")
    if len(data) > bytes_max:
        raise RepositoryError(f"{what} is larger than {bytes_max} bytes")
    return data


def _read_regular(path: Path, bytes_max: int) -> bytes | None:
    # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(bytes_max)
    finally:
        os.close(descriptor)


def refuse_open_to_all(path: Path, what: str) -> None:
    """Refuse a folder or file that every user of this host may write: plans and exported programs
    run code when they are loaded, so whoever writes a model decides what the server does.

    What is mounted read-only is nobody's to write. Raises RepositoryError, OSError.
    """
    if path.stat().st_mode & stat.S_IWOTH and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise RepositoryError(
            f"{what} '{path}' may be written by every user of this host, who could so run code as "
            f"the server's user; take that away: chmod o-w {shlex.quote(str(path))}"
        )


def reason_of(error: OSError | ValueError) -> str:
    """The cause without the path, which is a matter between the server and its owner."""
    return (isinstance(error, OSError) and error.strerror) or "not a usable path"


def _shown(relative: str) -> str:
    text = ascii(relative)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(relative)} characters)"
