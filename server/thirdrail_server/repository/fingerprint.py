# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of model folders: two equal ones mean that nobody touched the folder between."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.layout import ModelFolder

FILES_MAX = 10_000
DEPTH_MAX = 8

# Per file: path inside the model folder, size in bytes, mtime in ns, inode. The inode tells an
# atomic replacement by a file of the same size and an older (copied) mtime.
FileStamp = tuple[str, int, int, int]
Fingerprint = tuple[FileStamp, ...]


def snapshot(folders: Mapping[str, ModelFolder]) -> dict[str, Fingerprint]:
    """The fingerprint of each model; one that cannot be taken is represented by its error."""
    return {name: _fingerprint_or_error(folder) for name, folder in folders.items()}


def fingerprint(folder: ModelFolder) -> Fingerprint:
    """All files of a model folder but hidden ones. Raises RepositoryError above FILES_MAX files."""
    stamps: list[FileStamp] = []
    for stamp in _stamps(folder.root, folder.path, "", DEPTH_MAX):
        if len(stamps) == FILES_MAX:
            raise RepositoryError(f"model '{folder.name}' has more than {FILES_MAX} files")
        stamps.append(stamp)
    return tuple(stamps)


def _fingerprint_or_error(folder: ModelFolder) -> Fingerprint:
    if folder.problem is not None and not folder.path.is_relative_to(folder.root):
        return ((folder.problem, -1, 0, 0),)
    try:
        return fingerprint(folder)
    except RepositoryError as error:
        return ((str(error), -1, 0, 0),)


def _stamps(root: Path, folder: Path, prefix: str, depth: int) -> Iterator[FileStamp]:
    # Symlinks are followed, because deployments swap models by turning a link; but never out of the
    # repository, and no deeper than DEPTH_MAX, which ends loops.
    try:
        real = Path(os.path.realpath(folder, strict=True))
        if not real.is_relative_to(root):
            return
        with os.scandir(real) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        yield (prefix, -1, 0, 0)
        return
    for entry in entries:
        if not entry.name.startswith("."):
            yield from _entry_stamps(root, entry, f"{prefix}{entry.name}", depth)


def _entry_stamps(
    root: Path, entry: os.DirEntry[str], relative: str, depth: int
) -> Iterator[FileStamp]:
    try:
        found = entry.stat()
        is_folder = entry.is_dir()
    except OSError:  # gone since it was listed, or a dangling link
        yield (relative, -1, 0, 0)
        return
    if is_folder:
        yield (f"{relative}/", 0, 0, found.st_ino)
        if depth > 0:
            yield from _stamps(root, Path(entry.path), f"{relative}/", depth - 1)
    else:
        yield (relative, found.st_size, found.st_mtime_ns, found.st_ino)
