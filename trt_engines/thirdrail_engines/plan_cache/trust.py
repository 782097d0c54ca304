# SPDX-License-Identifier: Apache-2.0
"""Whose files are used. A plan is executable code: who can write to a cache can run code here.

So a cache folder, and each file that is read from it, belongs to us or to root, and nobody else can
write to it, but for a group that it was given to. Folders are checked when a cache is opened, files
after they were opened: what was checked is then what is read.
"""

import os
import stat
from pathlib import Path

# O_NONBLOCK: opening somebody's FIFO must not wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class CacheFolderError(Exception):
    """This folder is not used as a cache. The text says why and what would help."""


class Untrusted(Exception):
    """Somebody else could have written this file."""


def check_folder(path: Path) -> None:
    """Raises CacheFolderError for a folder that others could have written to; OSError as stat."""
    fault = folder_fault(path, path.stat(), os.geteuid())
    if fault:
        raise CacheFolderError(fault)


def folder_fault(path: Path, found: os.stat_result, ours: int) -> str:
    """Why a folder is not used, "" if it is. ours: our user id."""
    if not stat.S_ISDIR(found.st_mode):
        return f"the plan cache {path} is not a folder"
    if found.st_uid not in (0, ours):
        return (
            f"the plan cache {path} belongs to uid {found.st_uid}, expected {ours} (ours) or root: "
            "plans are code, and its owner could have put any there. "
            f"Use another folder, or give it to us: chown -R {ours} {path}"
        )
    if found.st_mode & stat.S_IWOTH:
        return (
            f"the plan cache {path} has mode {stat.S_IMODE(found.st_mode):04o}: everybody can "
            f"write to it, and plans are code. Use another folder, or: chmod o-w {path}"
        )
    return ""


def open_trusted(name: str, folder: int) -> int:
    """Open a regular file for reading, relative to the open folder.

    Raises Untrusted, or OSError as open(2) does.
    """
    fd = os.open(name, _READ, dir_fd=folder)
    try:
        fault = file_fault(os.fstat(fd), os.geteuid())
        if fault:
            raise Untrusted(f"{name} {fault}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def file_fault(found: os.stat_result, ours: int) -> str:
    """Why an open file is not read, "" if it is."""
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_uid not in (0, ours):
        return f"belongs to uid {found.st_uid}, expected {ours} or root"
    if found.st_mode & stat.S_IWOTH:
        return f"has mode {stat.S_IMODE(found.st_mode):04o}: everybody can write to it"
    return ""
