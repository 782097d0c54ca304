# SPDX-License-Identifier: Apache-2.0
"""What is put is got, byte for byte; what is damaged, or might be somebody else's, is not."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.plan_caches import content, key, put
from thirdrail_engines.plan_cache import Manifest, Plan, PlanCache
from thirdrail_engines.plan_cache.reading import READ_AT_ONCE_BYTES_MAX, Damaged, read_and_hash
from thirdrail_engines.plans import BuildError, BuildFault

MIB = 1 << 20
Stored = Callable[..., Plan]


@pytest.mark.parametrize("size", [1, 100, 4095, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9_000_001])
def test_what_is_put_is_got(cache: PlanCache, size: int) -> None:
    data = content("a", size)
    given = put(cache, key("a"), data)
    got = cache.get(key("a"))
    assert got is not None
    assert given.data == got.data == data
    assert given.key == got.key == key("a")
    assert given.manifest.plan_bytes == got.manifest.plan_bytes == size
    assert got.manifest.plan_sha256 == hashlib.sha256(data).hexdigest()
    assert got.manifest.key_parts == {"name": "a"}
    assert (got.manifest.source, got.manifest.build_s) == ("model.onnx", 1.5)
    assert got.data.readonly


def test_an_empty_cache_has_nothing(cache: PlanCache) -> None:
    assert cache.get(key("a")) is None


def test_another_key_is_a_miss(cache: PlanCache, stored: Stored) -> None:
    stored("one")
    assert cache.get(key("two")) is None


def test_it_is_there_for_the_next_process(cache: PlanCache, folder: Path, stored: Stored) -> None:
    stored("one", b"bytes")
    cache.close()
    with PlanCache(folder, 1) as later:
        plan = later.get(key("one"))
        assert plan is not None
        assert bytes(plan.data) == b"bytes"


def test_the_plan_is_a_plain_file(folder: Path, stored: Stored) -> None:
    plan = stored("one", b"bytes")
    assert (folder / "plans" / plan.key.digest / "plan").read_bytes() == b"bytes"


def test_it_moves_what_was_built_and_leaves_nothing(cache: PlanCache, folder: Path) -> None:
    with cache.workspace() as work:
        (work / "built").write_bytes(b"plan")
        inode = (work / "built").stat().st_ino
        plan = cache.put(key("a"), work / "built", Manifest())
        assert not (work / "built").exists()
    assert (folder / "plans" / plan.key.digest / "plan").stat().st_ino == inode
    assert list((folder / "work").iterdir()) == []
    assert list((folder / "locks").iterdir()) == []


def test_a_plan_built_elsewhere_is_copied(cache: PlanCache) -> None:
    """On another file system than the cache, where there is one here."""
    others = [each for each in ("/dev/shm", "/tmp") if os.access(each, os.W_OK)]
    for parent in others:
        path = Path(parent) / f"thirdrail-test-plan-{os.getpid()}"
        path.write_bytes(b"from afar")
        try:
            cache.put(key(parent), path, Manifest())
        finally:
            path.unlink(missing_ok=True)
        got = cache.get(key(parent))
        assert got is not None
        assert bytes(got.data) == b"from afar"


def test_putting_again_replaces(cache: PlanCache) -> None:
    put(cache, key("a"), b"first")
    put(cache, key("a"), b"second")
    got = cache.get(key("a"))
    assert got is not None
    assert bytes(got.data) == b"second"


@pytest.mark.parametrize("left", [None, b""])
def test_a_build_that_left_nothing_is_said_to(cache: PlanCache, left: bytes | None) -> None:
    with cache.workspace() as work:
        if left is not None:
            (work / "plan").write_bytes(left)
        with pytest.raises(BuildError, match=r"the build left (no|an empty) plan at") as caught:
            cache.put(key("a"), work / "plan", Manifest())
    assert caught.value.fault is BuildFault.MISSING


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_warned_of_once_until_the_plan_is_whole_again(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who builds it again looks for it several times."""
    path = folder / "plans" / key("a").digest / "plan"
    for times in (1, 2):
        cache.release(put(cache, key("a"), b"plan").key)
        flip(path, 0)
        assert cache.get(key("a")) is None
        assert cache.get(key("a")) is None
        assert caplog.text.count(f"the plan in {path.parent} is not used") == times


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte": (lambda p: flip(p / "plan", 0), "checksum"),
    "last byte": (lambda p: flip(p / "plan", -1), "checksum"),
    "a byte inside": (lambda p: flip(p / "plan", 500_000), "checksum"),
    "cut by one": (lambda p: cut(p / "plan", 999_999), "has 999999 bytes, .* says 1000000"),
    "cut to nothing": (lambda p: cut(p / "plan", 0), "has 0 bytes"),
    "longer": (lambda p: cut(p / "plan", 1_000_001), "has 1000001 bytes"),
    "no manifest's JSON": (lambda p: flip(p / "manifest.json", 0), "is not JSON"),
    "cut manifest": (lambda p: cut(p / "manifest.json", 100), "is not JSON"),
    "empty manifest": (lambda p: cut(p / "manifest.json", 0), "is not JSON"),
    "a link": (lambda p: relink(p / "plan"), "cannot be read: too many levels"),
    "a folder": (lambda p: replace_by_folder(p / "plan"), "not a regular file"),
    "a pipe": (lambda p: replace_by_pipe(p / "plan"), "not a regular file"),
    "a pipe for a manifest": (lambda p: replace_by_pipe(p / "manifest.json"), "not a regular"),
    "world-writable": (lambda p: (p / "plan").chmod(0o666), "mode 0666: everybody can write"),
    "world-writable manifest": (lambda p: (p / "manifest.json").chmod(0o646), "mode 0646"),
}


def relink(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_warned_about_and_built_anew(
    cache: PlanCache, folder: Path, stored: Stored, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    data = content("a", 1_000_000)
    plan = stored("a", data)
    harm, text = DAMAGE[how]
    harm(folder / "plans" / plan.key.digest)
    with caplog.at_level(logging.WARNING):
        assert cache.get(plan.key) is None
    [record] = caplog.records
    assert plan.key.digest in record.getMessage()
    assert re.search(text, record.getMessage()), record.getMessage()
    put(cache, plan.key, data)
    got = cache.get(plan.key)
    assert got is not None
    assert got.data == data


@pytest.mark.parametrize("gone", ["plan", "manifest.json"])
def test_half_an_entry_is_none(cache: PlanCache, folder: Path, stored: Stored, gone: str) -> None:
    plan = stored()
    (folder / "plans" / plan.key.digest / gone).unlink()
    assert cache.get(plan.key) is None


def test_an_entry_under_anothers_key_is_none(
    cache: PlanCache, folder: Path, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    plan = stored("one")
    (folder / "plans" / plan.key.digest).rename(folder / "plans" / key("two").digest)
    assert cache.get(key("two")) is None
    assert f"the manifest is of another plan, '{plan.key.digest}'" in caplog.text


def test_an_entry_that_is_a_link_is_none(cache: PlanCache, folder: Path, stored: Stored) -> None:
    plan = stored("one")
    path = folder / "plans" / plan.key.digest
    shutil.move(path, folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert cache.get(plan.key) is None


def test_what_was_checked_is_what_is_handed_over(
    cache: PlanCache, folder: Path, stored: Stored
) -> None:
    """Whoever still has the file open can change it, and changes nothing that was handed over."""
    plan = stored("a", content("a", 1_000_000))
    got = cache.get(plan.key)
    assert got is not None
    with (folder / "plans" / plan.key.digest / "plan").open("r+b") as file:
        file.write(b"\0" * 1_000_000)
        file.truncate(10)
    assert got.data == content("a", 1_000_000)


@pytest.mark.parametrize("size", [5, READ_AT_ONCE_BYTES_MAX - 4, READ_AT_ONCE_BYTES_MAX])
def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path: Path, size: int) -> None:
    path = tmp_path / "plan"
    path.write_bytes(bytes(size))
    text = f"ends after {size} bytes, expected {size + 4}"
    with path.open("rb") as file, pytest.raises(Damaged, match=text):
        read_and_hash(file.fileno(), size + 4)


def test_the_bytes_are_hashed_where_they_are_handed_over(
    cache: PlanCache, folder: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is changed after each piece was read: what is returned is what was hashed."""
    plan = stored("a", content("a", READ_AT_ONCE_BYTES_MAX + 1))
    path = folder / "plans" / plan.key.digest / "plan"
    real = os.preadv

    def read_then_change(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = real(fd, buffers, offset)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * count)
        return count

    monkeypatch.setattr(os, "preadv", read_then_change)
    got = cache.get(plan.key)
    assert got is not None
    assert got.data == content("a", READ_AT_ONCE_BYTES_MAX + 1)
    assert path.read_bytes() == bytes(READ_AT_ONCE_BYTES_MAX + 1)


def test_notes_are_remembered_per_name(cache: PlanCache, folder: Path, stored: Stored) -> None:
    plan = stored()
    assert cache.notes(plan, "proof") is None
    cache.note(plan, "proof", b"good")
    cache.note(plan, "runtime", b"\0\n" * 1000)
    cache.note(plan, "proof", b"better")
    with PlanCache(folder, 1) as other:
        assert other.notes(plan, "proof") == b"better"
        assert other.notes(plan, "runtime") == b"\0\n" * 1000
    assert list((folder / "work").iterdir()) == []


def test_notes_belong_to_the_bytes(cache: PlanCache) -> None:
    first = put(cache, key("a"), b"first")
    cache.note(first, "proof", b"good")
    second = put(cache, key("a"), b"second")
    assert cache.notes(second, "proof") is None
    cache.note(second, "proof", b"good too")
    assert cache.notes(second, "proof") == b"good too"
    assert cache.notes(first, "proof") is None


@pytest.mark.parametrize("at", [0, 20, 90, 150, -1])
def test_damaged_notes_are_none(
    cache: PlanCache,
    folder: Path,
    stored: Stored,
    caplog: pytest.LogCaptureFixture,
    at: int,
) -> None:
    plan = stored()
    cache.note(plan, "proof", b"good")
    flip(folder / "notes" / plan.key.digest / "proof", at)
    assert cache.notes(plan, "proof") is None
    if at != 20:  # there it is another plan's
        assert "proof is damaged" in caplog.text


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a" * 129, "a b", "a\0"])
def test_notes_have_plain_names(cache: PlanCache, stored: Stored, name: str) -> None:
    plan = stored()
    with pytest.raises(ValueError, match="a note cannot be called"):
        cache.note(plan, name, b"")
    with pytest.raises(ValueError, match="a note cannot be called"):
        cache.notes(plan, name)


def test_the_newest_notes_stay(cache: PlanCache, folder: Path, stored: Stored) -> None:
    plan = stored()
    for number in range(40):
        cache.note(plan, f"driver-{number}", b"x")
        path = folder / "notes" / plan.key.digest / f"driver-{number}"
        os.utime(path, ns=(number, number))
    left = {path.name for path in (folder / "notes" / plan.key.digest).iterdir()}
    assert len(left) == 32
    assert "driver-39" in left
    assert "driver-0" not in left
