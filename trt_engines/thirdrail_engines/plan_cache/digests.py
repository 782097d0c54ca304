# SPDX-License-Identifier: Apache-2.0
"""What files contain, in 32 bytes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from thirdrail_engines.engine import ModelFileError

PIECE_BYTES = 1 << 18  # stays in a core's cache between being read and being hashed

Digest = Callable[[Path], str]


def digest_of(path: Path) -> str:
    """Of a file's content, as the parts of a key have it. Raises ModelFileError."""
    piece = memoryview(bytearray(PIECE_BYTES))
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                digest.update(piece[:count])
    except OSError as error:
        raise _unreadable(path, error) from None
    return f"sha256:{digest.hexdigest()}"


class KnownDigests:
    """`digest_of`, for those who ask again within one load: a file is read again if it changed.

    What the file system does not tell apart is not seen: another content of the same size, written
    within a tick of the clock of its times (4 ms). So who builds has to read the files once more.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def __call__(self, path: Path) -> str:
        """Raises ModelFileError."""
        try:
            found = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        state = _state_of(found)
        known, digest = self._known.get(path, ((), ""))
        if known != state:
            digest = digest_of(path)
            self._known[path] = state, digest
        return digest


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(f"cannot read {path}: {(error.strerror or str(error)).lower()}")
