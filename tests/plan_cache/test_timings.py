# SPDX-License-Identifier: Apache-2.0
"""What TensorRT measured is kept for later builds, and nothing depends on it."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from plan_cache.conftest import MIB
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_cache.timings import TIMINGS_BYTES_MAX, TIMINGS_MAX

NAME = "tensorrt-11.4.0-0123456789abcdef"


def test_what_was_kept_last_is_read_by_the_next_process(cache: PlanCache, folder: Path) -> None:
    assert cache.timings.read(NAME) == b""
    assert cache.timings.keep(NAME, b"first")
    assert cache.timings.keep(NAME, b"second")
    with PlanCache(folder, MIB) as other:
        assert other.timings.read(NAME) == b"second"
        assert other.timings.read(NAME + "x") == b""
    assert list((folder / "work").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"thirdrail-timings 1 00\nfirst", None])
def test_what_is_damaged_is_as_good_as_absent(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    cache.timings.keep(NAME, b"first")
    path = folder / "timings" / NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert cache.timings.read(NAME) == b""
    assert f"the timings in {path.parent} are not used: {NAME} is damaged" in caplog.text
    assert cache.timings.keep(NAME, b"second")
    assert cache.timings.read(NAME) == b"second"


def test_what_others_can_write_is_not_used(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.timings.keep(NAME, b"first")
    (folder / "timings" / NAME).chmod(0o666)
    assert cache.timings.read(NAME) == b""
    assert "everybody can write to it" in caplog.text


def test_they_are_bounded_in_size_and_number(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not cache.timings.keep(NAME, b"")
    assert not cache.timings.keep(NAME, bytes(TIMINGS_BYTES_MAX + 1))
    assert caplog.text.count("are not kept, expected 1 to") == 2
    for number in range(TIMINGS_MAX + 3):
        assert cache.timings.keep(f"n{number}", b"t")
    assert len(list((folder / "timings").iterdir())) == TIMINGS_MAX
    assert cache.timings.read(f"n{TIMINGS_MAX + 2}") == b"t"


def test_a_read_only_cache_lends_its_own(cache: PlanCache, folder: Path, tmp_path: Path) -> None:
    cache.timings.keep(NAME, b"of the build farm")
    with PlanCache(tmp_path / "own", MIB, [folder]) as own:
        assert own.timings.read(NAME) == b"of the build farm"
        own.timings.keep(NAME, b"own")
        assert own.timings.read(NAME) == b"own"
    assert cache.timings.read(NAME) == b"of the build farm"


def test_a_disk_that_takes_nothing_costs_a_warning(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "timings").write_bytes(b"a file in its place")
    with caplog.at_level(logging.WARNING):
        assert not cache.timings.keep(NAME, b"first")
        assert cache.timings.read(NAME) == b""
    assert "timings are not kept: " in caplog.text


def test_a_folder_that_others_can_write_to_costs_a_warning(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And not the plan that was just built."""
    assert cache.timings.keep(NAME, b"first")
    (folder / "timings").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert not cache.timings.keep(NAME, b"second")
    assert "timings are not kept: the plan cache" in caplog.text


KEEP_MANY = """
import sys
from pathlib import Path
from thirdrail_engines.plan_cache import PlanCache
with PlanCache(Path(sys.argv[1]), 1 << 20) as cache:
    for number in range(100):
        assert cache.timings.keep(sys.argv[2], sys.argv[3].encode() * 50_000)
        found = cache.timings.read(sys.argv[2])
        assert found in (b"a" * 50_000, b"b" * 50_000), found[:20]
"""


def test_two_processes_that_keep_at_once_leave_one_of_the_two(
    cache: PlanCache, folder: Path
) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", KEEP_MANY, str(folder), NAME, letter],
            stderr=subprocess.PIPE,
            text=True,
        )
        for letter in "ab"
    ]
    for process in started:
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
    assert cache.timings.read(NAME) in (b"a" * 50_000, b"b" * 50_000)
