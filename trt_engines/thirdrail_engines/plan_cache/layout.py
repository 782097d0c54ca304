# SPDX-License-Identifier: Apache-2.0
"""Where things lie in a cache folder. See the package's docstring."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PLAN = "plan"
MANIFEST = "manifest.json"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOTE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Layout:
    root: Path

    @property
    def plans(self) -> Path:
        return self.root / "plans"

    @property
    def notes(self) -> Path:
        return self.root / "notes"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def timings(self) -> Path:
        """Made when the first are kept."""
        return self.root / "timings"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.plans, self.notes, self.locks, self.work)


def default_folder() -> Path:
    """This user's cache, by the XDG base directory specification: a relative path is ignored."""
    said = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (said if said.is_absolute() else Path.home() / ".cache") / "thirdrail" / "plans"


def is_digest(name: str) -> bool:
    return bool(_DIGEST.fullmatch(name))


def check_note_name(name: str) -> None:
    if not _NOTE_NAME.fullmatch(name):
        raise ValueError(
            f"a note cannot be called {name!r}, expected up to 128 letters, digits, dots, dashes "
            "and underscores, the first a letter or digit"
        )
