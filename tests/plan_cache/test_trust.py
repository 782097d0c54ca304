# SPDX-License-Identifier: Apache-2.0
"""Plans are code: folders that somebody else could have written to are refused, in plain words."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from support.plan_caches import key
from thirdrail_engines.plan_cache import CacheFolderError, Plan, PlanCache
from thirdrail_engines.plan_cache.trust import file_fault, folder_fault

OURS = 1000


def found(mode: int, uid: int) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, uid, uid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("kind", "mode", "uid", "text"),
    [
        (stat.S_IFDIR, 0o755, OURS, ""),
        (stat.S_IFDIR, 0o775, OURS, ""),
        (stat.S_IFDIR, 0o755, 0, ""),
        (stat.S_IFDIR, 0o755, OURS + 1, "belongs to uid 1001, expected 1000 (ours) or root"),
        (stat.S_IFDIR, 0o757, OURS, "has mode 0757: everybody can write to it"),
        (stat.S_IFDIR, 0o1777, 0, "has mode 1777: everybody can write to it"),
        (stat.S_IFREG, 0o755, OURS, "is not a folder"),
    ],
)
def test_which_folders_are_used(kind: int, mode: int, uid: int, text: str) -> None:
    fault = folder_fault(Path("/cache"), found(kind | mode, uid), OURS)
    assert text in fault
    assert bool(text) == bool(fault)
    if fault:
        assert fault.startswith("the plan cache /cache ")


@pytest.mark.parametrize(
    ("kind", "mode", "uid", "text"),
    [
        (stat.S_IFREG, 0o664, OURS, ""),
        (stat.S_IFREG, 0o644, 0, ""),
        (stat.S_IFREG, 0o644, OURS + 1, "belongs to uid 1001, expected 1000 or root"),
        (stat.S_IFREG, 0o646, OURS, "has mode 0646: everybody can write to it"),
        (stat.S_IFIFO, 0o600, OURS, "is not a regular file"),
    ],
)
def test_which_files_are_read(kind: int, mode: int, uid: int, text: str) -> None:
    fault = file_fault(found(kind | mode, uid), OURS)
    assert text in fault
    assert bool(text) == bool(fault)


@pytest.mark.parametrize("inside", ["", "plans", "notes", "locks", "work"])
def test_a_world_writable_folder_is_refused(folder: Path, inside: str) -> None:
    PlanCache(folder, 1).close()
    path = folder / inside
    path.chmod(0o777)
    with pytest.raises(CacheFolderError) as caught:
        PlanCache(folder, 1)
    assert str(caught.value) == (
        f"the plan cache {path} has mode 0777: everybody can write to it, and plans are code. "
        f"Use another folder, or: chmod o-w {path}"
    )


def test_so_is_a_read_only_layer(folder: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    PlanCache(layer, 1).close()
    layer.chmod(0o777)
    with pytest.raises(CacheFolderError, match=f"{layer} has mode 0777"):
        PlanCache(folder, 1, [layer])


def test_so_is_a_folder_of_another_user(folder: Path) -> None:
    """Only root can make one here; who is not root is not given to."""
    PlanCache(folder, 1).close()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(CacheFolderError, match=f"{folder} belongs to uid 12345, expected 0"):
            PlanCache(folder, 1)


def test_a_plan_of_another_user_is_not_read(
    folder: Path, stored: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    plan = stored("one")
    if os.geteuid() == 0:
        os.chown(folder / "plans" / plan.key.digest / "plan", 12345, 12345)
        with PlanCache(folder, 1) as cache:
            assert cache.get(key("one")) is None
        assert "the file plan belongs to uid 12345, expected 0 or root" in caplog.text


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(CacheFolderError, match=f"the plan cache {path} is not a folder"):
        PlanCache(path, 1)
    with pytest.raises(CacheFolderError, match=f"the plan cache {path} is not a folder"):
        PlanCache(tmp_path / "cache", 1, [path])


def test_what_we_make_is_ours_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        PlanCache(folder / "a/b", 1).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "a/b").stat().st_mode) == 0o700
    for inside in ("plans", "notes", "locks", "work"):
        assert not (folder / "a/b" / inside).stat().st_mode & 0o022
