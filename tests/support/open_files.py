# SPDX-License-Identifier: Apache-2.0
"""What this process has open, for tests that must leave nothing behind.

A count would not do: what an earlier test left may be closed while a test runs.
"""

import os


def open_files() -> dict[str, str]:
    """File descriptor -> what it is, e.g. "socket:[4711]"."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own, or closed by another thread
            continue
    return found


def opened_since(before: dict[str, str]) -> list[str]:
    return sorted(what for fd, what in open_files().items() if before.get(fd) != what)
