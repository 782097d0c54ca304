# SPDX-License-Identifier: Apache-2.0
"""What lies at a path. pathlib's own questions (`is_file`, `exists`) are not for this: since Python
3.14 they answer "no" where the truth is that nobody may look.
"""

import errno
import os
import stat
from pathlib import Path

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def is_there(path: Path) -> bool:
    """Whether a path, or what it links to, exists. Raises OSError where that cannot be seen."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether it is, or links to, a regular file. Raises OSError where that cannot be seen."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether it is, or links to, a folder. Raises OSError where that cannot be seen."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
