# SPDX-License-Identifier: Apache-2.0
"""Opening cache folders: made where there is none, refused where others can write, used as it is
where we cannot."""

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.trust import CacheFolderError, check_folder
from thirdrail_engines.plan_cache.workspaces import sweep, workspace_in

log = logging.getLogger(__name__)


def open_main(folder: Path) -> Layout | None:
    """A folder that we can save to; None, with a warning, where we cannot.

    Raises CacheFolderError when others can write to it.
    """
    layout = Layout(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_folder(folder)
        for each in layout.folders:
            each.mkdir(mode=0o755, exist_ok=True)
            check_folder(each)
            if not os.access(each, os.R_OK | os.W_OK | os.X_OK):
                raise _refusal(each)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise CacheFolderError(f"the plan cache {folder} is not a folder") from None
        log.warning(
            "the plan cache %s cannot be written to (%s): plans in it are used, and new ones are "
            "built again by each server that needs them",
            folder,
            reason_of(error),
        )
        return None
    return layout


def open_layer(folder: Path) -> Layout:
    """A folder that is only read. One that is missing holds nothing, with a warning.

    Raises CacheFolderError when others can write to it.
    """
    layout = Layout(folder)
    try:
        for each in (folder, layout.plans):
            check_folder(each)
    except OSError as error:
        log.warning("the read-only plan cache %s: %s", folder, reason_of(error))
    return layout


def open_scratch() -> Layout:
    """Where this user builds when the cache cannot be written to, and who builds what is told.

    Raises CacheFolderError when it is not ours alone, OSError when it cannot be made.
    """
    folder = Path(tempfile.gettempdir()) / f"thirdrail-builds-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.geteuid():
        raise CacheFolderError(f"{folder} is not ours, and plans are built there: remove it")
    check_folder(folder)
    layout = Layout(folder)
    for each in (layout.locks, layout.work):
        each.mkdir(mode=0o700, exist_ok=True)
    return layout


@contextlib.contextmanager
def scratch_workspace() -> Iterator[Path]:
    """A private folder there, removed at the end, and by the next who asks for one if this process
    dies before. Raises as `open_scratch`."""
    work = open_scratch().work
    sweep(work)
    with workspace_in(work) as folder:
        yield folder


def _refusal(folder: Path) -> OSError:
    is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    code = errno.EROFS if is_read_only else errno.EACCES
    return OSError(code, os.strerror(code), str(folder))


def reason_of(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
