# SPDX-License-Identifier: Apache-2.0
"""Private folders for things that are not finished. Who uses one holds its lock; one that nobody
holds was left by somebody who died, and is removed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thirdrail_engines.plan_cache.locks import is_still_at, open_folder, try_lock
from thirdrail_engines.plans import BuildError, BuildFault


@contextmanager
def workspace_in(parent: Path) -> Iterator[Path]:
    """A new folder of mode 0700, removed at the end. Raises OSError where it cannot be made.

    Whatever failed in it is a BuildError OUT_OF_DISK if somebody else has removed it meanwhile:
    those who wrote there seldom know why they could not.
    """
    path, fd = _make(parent)
    try:
        yield path
    except BuildError as error:
        if error.fault is BuildFault.CANCELLED or path.is_dir():
            raise
        raise BuildError(
            BuildFault.OUT_OF_DISK, f"{path} was removed by others while it was in use"
        ) from None
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def sweep(parent: Path) -> int:
    """Remove what died users left. Returns how many folders that were."""
    try:
        names = os.listdir(parent)
    except OSError:
        return 0
    return sum(_sweep(parent / name) for name in names)


def discard(path: Path, parent: Path) -> None:
    """Take `path` away at once, by moving it, and remove it then. Raises OSError if it stays."""
    trash = parent / f"trash-{secrets.token_hex(8)}"
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _make(parent: Path) -> tuple[Path, int]:
    while True:  # ends: only a sweep that comes between two lines below takes a new folder away
        path = parent / f"{os.getpid()}-{secrets.token_hex(8)}"
        path.mkdir(mode=0o700)
        try:
            fd = open_folder(path)
        except FileNotFoundError:
            continue
        if try_lock(fd) and is_still_at(path, fd):
            return path, fd
        os.close(fd)


def _sweep(path: Path) -> bool:
    try:
        fd = open_folder(path)
    except OSError:  # gone, or no folder: not one of ours
        return False
    try:
        if not try_lock(fd):
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(fd)
