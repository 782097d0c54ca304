# SPDX-License-Identifier: Apache-2.0
"""Small things learnt about a plan on this machine: that it was proven, what its runtime prepared.

A note belongs to the plan's bytes and not to its key: one about an earlier build of the same key
is none. One line of text, then the data:

    thirdrail-note 1 SHA256-OF-THE-PLAN SHA256-OF-THE-DATA
"""

import contextlib
import hashlib
import os
from pathlib import Path

from thirdrail_engines.plan_cache.locks import open_folder
from thirdrail_engines.plan_cache.store import sync
from thirdrail_engines.plan_cache.trust import Untrusted, open_trusted

NOTE_BYTES_MAX = 256 << 20
NOTES_MAX = 32  # of one plan; the oldest goes


class NoteDamaged(Exception):
    """This note cannot be used. The text says why."""


def encoded(plan_sha256: str, data: bytes) -> bytes:
    return _first_line(plan_sha256, data) + data


def read_note(folder: Path, name: str, plan_sha256: str) -> bytes | None:
    """None when there is none about this plan. Raises NoteDamaged, OSError."""
    try:
        parent = open_folder(folder)
    except FileNotFoundError:
        return None
    try:
        fd = open_trusted(name, parent)
    except FileNotFoundError:
        return None
    except Untrusted as error:
        raise NoteDamaged(str(error)) from None
    finally:
        os.close(parent)
    with open(fd, "rb") as file:
        line = file.readline(256)
        data = file.read(NOTE_BYTES_MAX + 1)
    words = line.split()
    if len(words) == 4 and words[2].decode("ascii", "replace") != plan_sha256:
        return None
    if line != _first_line(plan_sha256, data):
        raise NoteDamaged(f"{name} is damaged")
    return data


def place_note(folder: Path, name: str, staged: Path) -> None:
    """Move a finished file to its place. Raises OSError."""
    folder.mkdir(mode=0o755, exist_ok=True)
    staged.rename(folder / name)
    sync(folder)
    others = sorted((each for each in folder.iterdir()), key=lambda each: each.stat().st_mtime_ns)
    for oldest in others[:-NOTES_MAX]:
        with contextlib.suppress(FileNotFoundError):
            oldest.unlink()


def _first_line(plan_sha256: str, data: bytes) -> bytes:
    return f"thirdrail-note 1 {plan_sha256} {hashlib.sha256(data).hexdigest()}\n".encode()
