# SPDX-License-Identifier: Apache-2.0
"""What TensorRT measured of kernels, kept in a cache's folder for later builds.

One file for each package, version and GPU. It is a help and never a condition: what is missing,
damaged or not to be trusted is measured anew. Whoever writes last wins: each build begins with
what was there, so little is lost, and nothing that a build depends on. One line, then the data:

    thirdrail-timings 1 SHA256-OF-THE-DATA
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from thirdrail_engines.plan_cache.layout import Layout, check_note_name
from thirdrail_engines.plan_cache.locks import open_folder
from thirdrail_engines.plan_cache.opening import reason_of
from thirdrail_engines.plan_cache.saving import write_synced
from thirdrail_engines.plan_cache.trust import (
    CacheFolderError,
    Untrusted,
    check_folder,
    open_trusted,
)
from thirdrail_engines.plan_cache.workspaces import workspace_in

log = logging.getLogger(__name__)

TIMINGS_BYTES_MAX = 64 << 20  # of one file
TIMINGS_MAX = 8  # the file that was written longest ago goes


class Timings:
    """The timings of one cache. Safe to use from several threads and processes."""

    def __init__(self, folders: Sequence[Path], main: Layout | None) -> None:
        """folders: asked in this order. main: where they are kept; None: nowhere."""
        self._folders = folders
        self._main = main

    def read(self, name: str) -> bytes:
        """b"" where there are none to use; what is damaged or not trusted is warned about."""
        check_note_name(name)
        for folder in self._folders:
            try:
                return _read(folder, name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Untrusted as error:
                log.warning("the timings in %s are not used: %s", folder, error)
            except OSError as error:
                log.warning("the timings in %s cannot be read: %s", folder, reason_of(error))
        return b""

    def keep(self, name: str, data: bytes) -> bool:
        """Put them in place of what was kept under the name. False, with a warning where it is
        somebody's fault, when they are not kept."""
        check_note_name(name)
        if self._main is None:
            return False
        if not 0 < len(data) <= TIMINGS_BYTES_MAX:
            log.warning(
                "timings of %d bytes are not kept, expected 1 to %d", len(data), TIMINGS_BYTES_MAX
            )
            return False
        try:
            self._place(self._main, name, data)
        except (CacheFolderError, OSError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else error
            log.warning("timings are not kept: %s", reason)
            return False
        return True

    def _place(self, main: Layout, name: str, data: bytes) -> None:
        main.timings.mkdir(mode=0o755, exist_ok=True)
        check_folder(main.timings)
        with workspace_in(main.work) as folder:
            staged = folder / name
            write_synced(staged, _first_line(data) + data)
            staged.rename(main.timings / name)
        others = sorted(main.timings.iterdir(), key=_written_ns)
        for oldest in others[:-TIMINGS_MAX]:
            with contextlib.suppress(FileNotFoundError):
                oldest.unlink()


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # somebody else made room as well
        return 0


def _read(folder: Path, name: str) -> bytes:
    """Raises Untrusted, OSError."""
    parent = open_folder(folder)
    try:
        fd = open_trusted(name, parent)
    finally:
        os.close(parent)
    with open(fd, "rb") as file:
        line = file.readline(256)
        data = file.read(TIMINGS_BYTES_MAX + 1)
    if line != _first_line(data):
        raise Untrusted(f"{name} is damaged")
    return data


def _first_line(data: bytes) -> bytes:
    return f"thirdrail-timings 1 {hashlib.sha256(data).hexdigest()}\n".encode()
