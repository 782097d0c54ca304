# SPDX-License-Identifier: Apache-2.0
"""A limit on a build's memory that the kernel keeps: a cgroup (v2), where one is delegated to us.

The watch over the process tree (run.py) is there in any case. This one is exact, and counts what a
build holds between two looks. A group can be made below our own or, as systemd's DelegateSubgroup=
leaves it, beside our own; where neither is permitted, or the memory controller is not there, there
is none. Documented in the kernel's admin-guide/cgroup-v2.rst.
"""

import contextlib
import errno
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_EMPTY_S_MAX = 1.0  # for killed processes to be gone, which takes milliseconds
_LOOK_S = 0.005


class MemoryGroup:
    """folder: None for the group that could not be had."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def was_exceeded(self) -> bool:
        """Whether the kernel has killed in it for want of memory."""
        if self.folder is None:
            return False
        try:
            events = (self.folder / "memory.events").read_text().split()
        except OSError:
            return False
        return int(dict(zip(events[::2], events[1::2], strict=True)).get("oom_kill", "0")) > 0


@contextlib.contextmanager
def of(pid: int, bytes_max: int) -> Iterator[MemoryGroup]:
    """Put a process into a group of its own, for as long as the context lasts. Never raises.

    All of its processes are killed at the end. bytes_max: 0 for none, and then there is no group.
    """
    folder = _made(pid, bytes_max) if bytes_max else None
    try:
        yield MemoryGroup(folder)
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):
                (folder / "cgroup.kill").write_text("1")
            _remove(folder)


def _remove(folder: Path) -> None:
    """It stays behind, empty, where a killed process does not end."""
    ends_s = time.monotonic() + _EMPTY_S_MAX
    while True:  # ends: with the last process, or in time
        try:
            return folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > ends_s:
                return None
        time.sleep(_LOOK_S)


def _made(pid: int, bytes_max: int) -> Path | None:
    own = _own_folder()
    for parent in (own, own.parent) if own is not None else ():
        folder = parent / f"thirdrail-build-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if _enter(folder, pid, bytes_max):
            return folder
        with contextlib.suppress(OSError):
            folder.rmdir()
    return None


def _enter(folder: Path, pid: int, bytes_max: int) -> bool:
    """These files are the kernel's: each is there only where its controller is, and permits it."""
    wanted = {"memory.max": bytes_max, "memory.oom.group": 1, "cgroup.procs": pid}
    try:
        for name, value in wanted.items():
            with (folder / name).open("r+") as file:
                file.write(str(value))
    except OSError:
        return False
    return True


def _own_folder() -> Path | None:
    """Our group in the unified hierarchy, mounted at its usual place; None without that."""
    try:
        if not (_ROOT / "cgroup.controllers").exists():
            return None
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return _ROOT / line[len("0::/") :]
    except OSError:
        pass
    return None
