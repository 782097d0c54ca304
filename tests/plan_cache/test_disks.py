# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, and folders that can only be read."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.plan_caches import content, key, put, tell_nobody
from support.small_disk import can_mount, run_on_small_disk, run_read_only
from thirdrail_engines.plan_cache import (
    CacheFolderError,
    Manifest,
    Plan,
    PlanCache,
    scratch_workspace,
)
from thirdrail_engines.plans import BuildError, BuildFault

MIB = 1 << 20
Stored = Callable[..., Plan]

FULL_DISK = """
    import logging
    from support.plan_caches import *
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")

    def left():
        return sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file())

    with PlanCache(disk / "cache", 1 << 30) as cache:
        first = put(cache, key("first"), content("first", 100_000))
        before = left()
        {what}
        assert left() == before, left()
        assert cache.get(key("first")).data == content("first", 100_000)
        cache.note(first, "small", b"fits")
        assert cache.notes(first, "small") == b"fits"
"""


def test_a_full_disk_is_named_and_left_as_it_was(tmp_path: Path) -> None:
    """The plan was built on another disk and has to be copied."""
    if not can_mount():
        return  # there is no other disk: the next test has to do
    (tmp_path / "built").write_bytes(content("large", 3 * MIB))
    built = str(tmp_path / "built")
    what = (
        f"plan = cache.put(key('large'), Path({built!r}), Manifest()); "
        "assert plan.data == content('large', 3 * MIB)"
    )
    said = run_on_small_disk(tmp_path / "disk", 2 * MIB, FULL_DISK.format(what=what))
    assert said == (
        f"plan {key('large').digest[:12]} is not kept: no space left on device in "
        f"{tmp_path}/disk/cache. Free some, or lower the cache's limit\n"
    )


def test_a_large_manifest_on_a_full_disk(tmp_path: Path) -> None:
    what = """
        with cache.workspace() as work:
            (work / "plan").write_bytes(b"plan")
            plan = cache.put(key("large"), work / "plan", Manifest(warnings=["w" * 3 * MIB]))
            assert bytes(plan.data) == b"plan", "a build of half an hour is not thrown away"
    """.strip()
    said = run_on_small_disk(tmp_path / "disk", 2 * MIB, FULL_DISK.format(what=what))
    reason = "no space left on device" if can_mount() else "file too large"
    assert f"is not kept: {reason}" in said


def test_a_note_on_a_full_disk_is_not_kept(tmp_path: Path) -> None:
    what = "cache.note(first, 'large', bytes(3 * MIB))"
    said = run_on_small_disk(tmp_path / "disk", 2 * MIB, FULL_DISK.format(what=what))
    assert said.startswith("note 'large' about plan ")


READ_ONLY = """
    import logging
    from support.plan_caches import *
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    with PlanCache(disk, 100 * MIB) as cache:
        assert cache.get(key("old")).data == content("old")
        assert cache.get(key("new")) is None
        with cache.building(key("new"), threading.Event(), tell_nobody):
            plan = put(cache, key("new"), content("new"))
        assert plan.data == content("new")
        assert cache.get(key("new")) is None
        cache.note(plan, "proof", b"good")
        assert cache.notes(plan, "proof") is None
"""


def test_a_cache_that_cannot_be_written_to_is_read(
    folder: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored("old", content("old"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    if can_mount():
        said = run_read_only(tmp_path / "disk", folder, READ_ONLY)
        assert "cannot be written to (read-only file system)" in said
        assert f"plan {key('new').digest[:12]} is not kept: the cache is only read" in said
    left = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert left == []


def test_a_cache_that_cannot_be_made_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with PlanCache(Path("/proc/thirdrail"), 100 * MIB) as cache:
        assert "the plan cache /proc/thirdrail cannot be written to" in caplog.text
        assert cache.get(key("a")) is None
        with cache.building(key("a"), threading.Event(), tell_nobody):
            assert bytes(put(cache, key("a"), b"plan").data) == b"plan"
        assert list((tmp_path / f"thirdrail-builds-{os.geteuid()}/work").iterdir()) == []


def test_what_a_killed_build_without_a_cache_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from thirdrail_engines.plan_cache import scratch_workspace as made; import os, signal\n"
    code += "with made() as folder: (folder / 'plan').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/work/*/plan"))) == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_workspace() as folder:
        assert list(tmp_path.glob("*/work/*")) == [folder]
    assert list(tmp_path.glob("*/work/*")) == []


def test_where_others_could_build_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trap = tmp_path / f"thirdrail-builds-{os.geteuid()}"
    trap.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(CacheFolderError, match=f"{trap} is not ours, and plans are built there"):
        PlanCache(Path("/proc/thirdrail"), 100 * MIB)


# Layers: caches of others, below our own.


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """What a build farm made."""
    with PlanCache(tmp_path / "farm", 100 * MIB) as cache:
        for name in ("one", "two"):
            put(cache, key(name), content(name))
    return tmp_path / "farm"


def test_layers_are_asked_and_left_alone(folder: Path, farm: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in farm.rglob("*")}
    with PlanCache(folder, 100 * MIB, [farm]) as cache:
        plan = cache.get(key("one"))
        assert plan is not None
        assert plan.data == content("one")
        assert cache.get(key("three")) is None
        cache.note(plan, "proof", b"good")
        assert cache.notes(plan, "proof") == b"good"
        cache.release(plan.key)
    assert {path: path.stat().st_mtime_ns for path in farm.rglob("*")} == before
    with PlanCache(folder, 100 * MIB, [farm]) as later:
        plan = later.get(key("one"))
        assert plan is not None
        assert later.notes(plan, "proof") == b"good", "it outlives us in our own folder"


def test_our_own_plan_comes_first(folder: Path, farm: Path) -> None:
    with PlanCache(folder, 100 * MIB, [farm]) as cache:
        put(cache, key("one"), b"our own")
        plan = cache.get(key("one"))
        assert plan is not None
        assert bytes(plan.data) == b"our own"


def test_the_first_layer_with_a_whole_plan_counts(
    folder: Path, farm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(farm, tmp_path / "damaged")
    path = tmp_path / "damaged/plans" / key("one").digest / "plan"
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with PlanCache(folder, 100 * MIB, [tmp_path / "damaged", farm]) as cache:
        plan = cache.get(key("one"))
        assert plan is not None
        assert plan.data == content("one")
    assert str(path.parent) in caplog.text


def test_a_layer_that_is_not_there_yet_is_warned_about(
    folder: Path, farm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    farm.rename(farm.with_name("later"))
    with PlanCache(folder, 100 * MIB, [farm]) as cache:
        assert f"the read-only plan cache {farm}: no such file or directory" in caplog.text
        assert cache.get(key("one")) is None
        farm.with_name("later").rename(farm)
        assert cache.get(key("one")) is not None


def test_notes_about_a_layers_plan_go_when_room_is_needed(folder: Path, farm: Path) -> None:
    with PlanCache(folder, MIB, [farm]) as cache:
        plan = cache.get(key("one"))
        assert plan is not None
        cache.note(plan, "runtime", bytes(MIB // 2))
        put(cache, key("three"), content("three", MIB * 3 // 4))
        assert cache.notes(plan, "runtime") is None


def test_several_layers_for_one_build_farm_command(folder: Path, farm: Path) -> None:
    """The same folder may be read and, by others, be written."""
    with PlanCache(folder, 100 * MIB, [farm]) as cache, PlanCache(farm, 100 * MIB) as builder:
        assert cache.get(key("three")) is None
        with builder.workspace() as work:
            (work / "plan").write_bytes(b"built later")
            builder.put(key("three"), work / "plan", Manifest())
        plan = cache.get(key("three"))
        assert plan is not None
        assert bytes(plan.data) == b"built later"


PRUNED_WHEN_FULL = """
    from support.plan_caches import *
    from thirdrail_engines.plan_cache.layout import Layout
    from thirdrail_engines.plan_cache.pruning import Pruning, prune_folder

    with PlanCache(disk / "cache", 1 << 30) as cache:
        put(cache, key("first"), content("first", 100_000))
    try:
        with (disk / "other").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError as error:
        print(error.strerror)
    print(len(prune_folder(Layout(disk / "cache"), Pruning(everything=True)).removed))
"""


def test_a_full_disk_can_be_pruned(tmp_path: Path) -> None:
    """Locks must not need the space that is to be made."""
    if not can_mount():
        return
    said = run_on_small_disk(tmp_path / "disk", 2 * MIB, PRUNED_WHEN_FULL)
    assert said == "No space left on device\n1\n"


@pytest.mark.parametrize("what", [".", "plans", "locks", "work"])
def test_a_cache_that_was_removed_under_us_is_made_again(
    folder: Path, cache: PlanCache, what: str
) -> None:
    shutil.rmtree(folder / what)
    with cache.building(key("a"), threading.Event(), tell_nobody):
        cache.release(put(cache, key("a"), b"plan").key)
    assert cache.get(key("a")) is not None


def test_a_cache_that_cannot_be_made_again_is_no_place_to_build(
    folder: Path, cache: PlanCache
) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")
    for use in (cache.workspace(), cache.building(key("a"), threading.Event(), tell_nobody)):
        with pytest.raises(BuildError, match="is not a folder") as caught, use:
            pass
        assert caught.value.fault is BuildFault.OUT_OF_DISK  # so plans are built elsewhere
