# SPDX-License-Identifier: Apache-2.0
"""Which entries this process uses: a shared lock on each one's folder, so that nobody evicts it."""

import os
import threading


class Holds:
    """Safe to use from several threads. The locks end with the process at the latest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, int]] = {}  # digest: open folder, how many users

    def keep(self, digest: str, fd: int) -> None:
        """Take over an open folder that is locked."""
        with self._lock:
            older, users = self._held.get(digest, (-1, 0))
            self._held[digest] = (fd, users + 1)
        if users:
            os.close(older)  # of the same entry, or of one that was replaced

    def drop(self, digest: str) -> None:
        """One user less. Nothing happens for what is not held."""
        with self._lock:
            fd, users = self._held.pop(digest, (-1, 0))
            if users > 1:
                self._held[digest] = (fd, users - 1)
        if users == 1:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            held, self._held = self._held, {}
        for fd, _ in held.values():
            os.close(fd)
