# SPDX-License-Identifier: Apache-2.0
"""The writable side of a cache folder: entries come whole, and go when room is needed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from thirdrail_engines.plan_cache import eviction
from thirdrail_engines.plan_cache.eviction import Occupant
from thirdrail_engines.plan_cache.layout import Layout, is_digest
from thirdrail_engines.plan_cache.locks import locked_file, open_folder, try_lock
from thirdrail_engines.plan_cache.workspaces import discard

CHANGING_S_MAX = 30.0  # to wait for somebody who changes the folder, which takes milliseconds


class NoRoom(Exception):
    """The limit leaves no room for this entry. The text says why."""


class Store:
    """One cache folder. Safe to use from several threads and processes."""

    def __init__(self, layout: Layout, bytes_max: int) -> None:
        self.layout = layout
        self._bytes_max = bytes_max

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else brings or takes entries. Raises LockTimeout, OSError."""
        with locked_file(self.layout.locks / "changing", wait_s_max=CHANGING_S_MAX):
            yield

    def save(self, entry: Path, digest: str) -> None:
        """Move a finished folder to its place, in place of an older one.

        Raises NoRoom, LockTimeout or OSError; nothing has changed then, but that room was made.
        """
        size_bytes = _size_of(entry)
        target = self.layout.plans / digest
        with self.changing():
            with contextlib.suppress(FileNotFoundError):
                discard(target, self.layout.work)
            self.make_room(size_bytes)
            entry.rename(target)
            sync(self.layout.plans)

    def make_room(self, bytes_needed: int) -> None:
        """Evict until so much fits. The caller holds `changing`. Raises NoRoom."""
        if bytes_needed > self._bytes_max:
            raise NoRoom(
                f"{_mib(bytes_needed)} is more than the cache's limit of {_mib(self._bytes_max)}"
            )
        found = occupants(self.layout)
        if eviction.victims(found, self._bytes_max, bytes_needed) == []:
            return
        found = [replace(each, is_in_use=self.is_in_use(each.digest)) for each in found]
        chosen = eviction.victims(found, self._bytes_max, bytes_needed)
        if chosen is None or not all(self.remove(each.digest) for each in chosen):
            used = sum(each.size_bytes for each in found if each.is_in_use)
            raise NoRoom(
                f"{_mib(bytes_needed)} does not fit beside {_mib(used)} of plans in use under the "
                f"cache's limit of {_mib(self._bytes_max)}"
            )

    def is_in_use(self, digest: str) -> bool:
        return not self._unless_in_use(digest, lambda: None)

    def remove(self, digest: str) -> bool:
        """Take an entry away unless somebody uses it. The caller holds `changing`."""
        return self._unless_in_use(digest, lambda: self._discard(digest))

    def _unless_in_use(self, digest: str, act: Callable[[], None]) -> bool:
        try:
            fd = open_folder(self.layout.plans / digest)
        except FileNotFoundError:  # notes alone
            act()
            return True
        try:
            if not try_lock(fd):
                return False
            act()
            return True
        finally:
            os.close(fd)

    def _discard(self, digest: str) -> None:
        for parent in (self.layout.plans, self.layout.notes):
            with contextlib.suppress(FileNotFoundError):
                discard(parent / digest, self.layout.work)


def occupants(layout: Layout) -> list[Occupant]:
    """What is in a cache folder: plans, notes, or both under one key."""
    found: dict[str, Occupant] = {}
    for parent in (layout.plans, layout.notes):
        for path in _entries(parent):
            try:
                each = Occupant(path.name, _size_of(path), path.stat().st_mtime_ns)
            except OSError:  # it is just going
                continue
            known = found.get(path.name, each)
            size = each.size_bytes if known is each else known.size_bytes + each.size_bytes
            used = max(known.used_ns, each.used_ns) if parent == layout.notes else each.used_ns
            found[path.name] = Occupant(path.name, size, used)
    return list(found.values())


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _entries(parent: Path) -> list[Path]:
    try:
        return [parent / name for name in os.listdir(parent) if is_digest(name)]
    except FileNotFoundError:
        return []


def _size_of(folder: Path) -> int:
    with os.scandir(folder) as listing:
        return sum(each.stat(follow_symlinks=False).st_size for each in listing)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
