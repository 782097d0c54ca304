# SPDX-License-Identifier: Apache-2.0
"""Model files that came with a load call, kept in a private folder for as long as they serve.

They are kept because a restarted worker loads them again. What may be uploaded is a list, not a
ban: graphs, weights and texts that are read as data. Compiled plans, pickles and programs run
code when they are loaded and are never taken.

A server that is killed cannot clean up. Its folder is therefore marked by a file lock, which the
system drops with the process: the next server that starts removes unlocked folders.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from thirdrail.errors import InvalidArgument, ResourceExhausted
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.paths import relative_parts

PREFIX = "thirdrail-uploads-"
LOCK = ".lock"
SUFFIXES = (".onnx", ".pbtxt", ".txt", ".bin", ".data")
PARTS_MAX = 8
TRIES_MAX = 10


class Uploads:
    """Folders of uploaded files, each a repository of one model. `close` removes them all.

    For any thread: writing takes long.
    """

    def __init__(self, files_max: int, bytes_max: int) -> None:
        self._files_max = files_max
        self._bytes_max = bytes_max
        self._root: Path | None = None
        self._root_lock = -1
        self._making_root = threading.Lock()

    def store(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Write `files` (path inside the model's folder -> content). Returns the new repository.

        Raises InvalidArgument (RepositoryError for a path that climbs), ResourceExhausted.
        """
        self._check(files)
        try:
            repository = Path(tempfile.mkdtemp(dir=self._own_root()))
            try:
                folder = repository.joinpath(*_single_part(name))
                for path, content in files.items():
                    _write(folder, path, content)
            except BaseException:
                self.discard(repository)
                raise
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InvalidArgument("a name in an uploaded file's path is too long") from None
            raise ResourceExhausted(f"uploaded files cannot be kept: {error.strerror}") from None
        return repository

    def discard(self, repository: Path) -> None:
        """Remove what `store` returned; any other folder is left alone."""
        if self._root is not None and repository.parent == self._root:
            shutil.rmtree(repository, ignore_errors=True)

    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            os.close(self._root_lock)
            self._root = None

    def _own_root(self) -> Path:
        with self._making_root:
            if self._root is None:
                self._root, self._root_lock = _new_root()
            return self._root

    def _check(self, files: Mapping[str, bytes]) -> None:
        if len(files) > self._files_max:
            raise ResourceExhausted(
                f"{len(files)} files were uploaded, at most {self._files_max} may be"
            )
        size = sum(map(len, files.values()))
        if size > self._bytes_max:
            raise ResourceExhausted(
                f"the uploaded files have {size} bytes, at most {self._bytes_max} may be"
            )
        for path in files:
            parts = relative_parts(path, "an uploaded file's path")
            if len(parts) > PARTS_MAX or PurePosixPath(parts[-1]).suffix not in SUFFIXES:
                raise InvalidArgument(
                    f"'{path}' cannot be uploaded: expected a file that ends in "
                    f"{', '.join(SUFFIXES)}, at most {PARTS_MAX - 1} folders deep"
                )


def _single_part(name: str) -> tuple[str, ...]:
    parts = relative_parts(name, "the model's name")
    if len(parts) != 1:
        raise RepositoryError(f"the model's name must be one folder's name, got {name!a}")
    return parts


def _write(folder: Path, path: str, content: bytes) -> None:
    target = folder.joinpath(*relative_parts(path, "an uploaded file's path"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(content)
    except (FileExistsError, NotADirectoryError):
        raise InvalidArgument(
            f"'{path}' cannot be uploaded: another uploaded file has its place"
        ) from None


def remove_abandoned() -> None:
    """Remove what servers of this user have left behind that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = _try_lock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _new_root() -> tuple[Path, int]:
    """A folder, mode 0700: only we may enter; and its lock. Raises OSError."""
    for _ in range(TRIES_MAX):
        root = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Before it is locked, a server that starts may take it for one that was left behind.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            return root, _try_lock(root)
    raise BlockingIOError(errno.EAGAIN, "other servers remove its folder")


def _try_lock(folder: Path) -> int:
    """The descriptor of the folder's lock file.

    Raises OSError, of which BlockingIOError when another process holds it and FileNotFoundError
    when that has just removed it.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(lock).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(folder / LOCK))
    except OSError:
        os.close(lock)
        raise
    return lock
