# SPDX-License-Identifier: Apache-2.0
"""A process with all that it started, seen through /proc: what it holds, and how it is ended.

It is a subreaper (isolation.py), so what its children leave behind stays below it.
"""

import contextlib
import os
import signal
from pathlib import Path

_KIB = 1024
_PROCESSES_MAX = 10_000  # a fork bomb shall not hold up who looks at it


def memory_bytes(pid: int) -> int:
    """What the tree holds besides mapped files, which the system can drop. 0 when it is gone.

    Memory that processes share counts once for each: the safe side.
    """
    return sum(_memory_of(member) for member in members(pid))


def kill(pid: int) -> None:
    """The tree, and the process group of its root, which outlives the root."""
    for member in members(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def members(pid: int) -> list[int]:
    """The root first."""
    found = [pid]
    for member in found:  # grows while it is read; ends: a process has one parent
        if len(found) >= _PROCESSES_MAX:
            break
        found.extend(_children(member))
    return found


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # it may end at any moment
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_bytes().split()]
    return found


def _memory_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return 0
    total_kib = 0
    for line in status.splitlines():
        if line.startswith((b"RssAnon:", b"RssShmem:")):
            total_kib += int(line.split()[1])
    return total_kib * _KIB
