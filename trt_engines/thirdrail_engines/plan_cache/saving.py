# SPDX-License-Identifier: Apache-2.0
"""How an entry is written: aside, synced to the disk, then moved to its place as a whole."""

import errno
import os
from pathlib import Path

from thirdrail_engines.plan_cache.layout import MANIFEST, PLAN
from thirdrail_engines.plan_cache.locks import open_folder, try_lock
from thirdrail_engines.plan_cache.manifest import encoded
from thirdrail_engines.plan_cache.reading import Plan
from thirdrail_engines.plan_cache.store import Store, sync
from thirdrail_engines.plan_cache.workspaces import workspace_in


def save_entry(store: Store, plan: Plan, plan_file: Path | None = None) -> int:
    """plan_file: a file with the plan's bytes, to be moved instead of written again.

    Returns the entry's open folder, whose shared lock keeps it from being evicted.
    Raises NoRoom, LockTimeout or OSError; nothing has changed then, but that room was made.
    """
    with workspace_in(store.layout.work) as folder:
        entry = folder / "entry"
        entry.mkdir(mode=0o755)
        write_synced(entry / MANIFEST, encoded(plan.manifest))
        if plan_file is None or not _moved(plan_file, entry / PLAN):
            write_synced(entry / PLAN, plan.data)
        sync(entry)
        fd = open_folder(entry)
        try:
            try_lock(fd, shared=True)  # nobody knows of it yet, so there is nobody to wait for
            store.save(entry, plan.key.digest)
        except BaseException:
            os.close(fd)
            raise
        return fd


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """A new file that others may read. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _moved(source: Path, target: Path) -> bool:
    """False where the source is on another file system."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    target.chmod(0o644)
    sync(target)
    return True
