# SPDX-License-Identifier: Apache-2.0
"""How large a model version is on disk."""

import os
from pathlib import Path

FILES_MAX = 10_000


def files_bytes(folder: Path) -> int:
    """The size of all files of a version: its model and the weights beside it. What cannot be read
    counts as nothing: the load will say so."""
    total = files = 0
    for parent, _folders, names in os.walk(folder):
        for name in names:
            files += 1
            if files > FILES_MAX:
                return total
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
