# SPDX-License-Identifier: Apache-2.0
"""The limit holds, the least recently used goes first, and what is in use stays."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.killable import killable
from support.plan_caches import content, key, put, use_plan
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_cache.eviction import Occupant, victims

MIB = 1 << 20
LIMIT = 3 * MIB + 100_000  # three plans of 1 MiB with their manifests

occupants = st.lists(
    st.builds(
        Occupant,
        digest=st.text("0123456789abcdef", min_size=4, max_size=4),
        size_bytes=st.integers(0, 50),
        used_ns=st.integers(0, 5),
        is_in_use=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.digest,
)


@given(occupants, st.integers(0, 200), st.integers(0, 100))
def test_victims(found: list[Occupant], bytes_max: int, bytes_needed: int) -> None:
    chosen = victims(found, bytes_max, bytes_needed)
    idle = [each for each in found if not each.is_in_use]

    def fits(gone: list[Occupant]) -> bool:
        return sum(e.size_bytes for e in found if e not in gone) + bytes_needed <= bytes_max

    if chosen is None:
        assert not fits(idle)
        return
    assert fits(chosen)
    assert not chosen or not fits(chosen[:-1]), "one more than needed"
    assert not any(each.is_in_use for each in chosen)
    oldest_kept = min((e.used_ns for e in idle if e not in chosen), default=9)
    assert all(each.used_ns <= oldest_kept for each in chosen)


@pytest.fixture
def small(folder: Path) -> Iterator[PlanCache]:
    with PlanCache(folder, LIMIT) as cache:
        yield cache


def fill(cache: PlanCache, *names: str) -> None:
    for name in names:
        put(cache, key(name), content(name, MIB))
        cache.release(key(name))


def names_in(folder: Path, *names: str) -> set[str]:
    there = set(os.listdir(folder / "plans"))
    return {name for name in names if key(name).digest in there}


def total(folder: Path) -> int:
    parents = (folder / "plans", folder / "notes")
    return sum(f.stat().st_size for each in parents for f in each.rglob("*") if f.is_file())


def test_the_oldest_goes(small: PlanCache, folder: Path) -> None:
    fill(small, "a", "b", "c", "d")
    assert names_in(folder, "a", "b", "c", "d") == {"b", "c", "d"}
    assert total(folder) <= LIMIT
    assert list((folder / "work").iterdir()) == []


def test_a_hit_counts_as_use(small: PlanCache, folder: Path) -> None:
    fill(small, "a", "b", "c")
    assert small.get(key("a")) is not None
    small.release(key("a"))
    fill(small, "d")
    assert names_in(folder, "a", "b", "c", "d") == {"a", "c", "d"}


def test_notes_count_and_go_with_their_plan(small: PlanCache, folder: Path) -> None:
    fill(small, "a")
    plan = small.get(key("a"))
    assert plan is not None
    small.note(plan, "runtime", bytes(MIB))
    small.release(plan.key)
    fill(small, "b")
    assert names_in(folder, "a", "b") == {"a", "b"}
    fill(small, "c")
    assert names_in(folder, "a", "b", "c") == {"b", "c"}
    assert list((folder / "notes").iterdir()) == []


def test_a_note_makes_room_as_well(small: PlanCache, folder: Path) -> None:
    fill(small, "a", "b", "c")
    plan = small.get(key("c"))
    assert plan is not None
    small.note(plan, "runtime", bytes(MIB))
    assert small.notes(plan, "runtime") == bytes(MIB)
    assert names_in(folder, "a", "b", "c") == {"b", "c"}


def test_what_is_in_use_stays(
    small: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for another user of the folder. Handed over anyway, the new one is not kept."""
    fill(small, "a", "b", "c")
    for name in ("a", "b"):
        assert small.get(key(name)) is not None
    with PlanCache(folder, LIMIT) as other:
        fill(other, "d")
        assert names_in(folder, "a", "b", "c", "d") == {"a", "b", "d"}
        assert other.get(key("d")) is not None
        plan = put(other, key("e"), content("e", MIB))
        assert plan.data == content("e", MIB)
        assert names_in(folder, "a", "b", "d", "e") == {"a", "b", "d"}
        assert "is not kept: 1.0 MiB does not fit beside 3.0 MiB of plans in use" in caplog.text
        assert list((folder / "work").iterdir()) == []
        small.release(key("a"))
        fill(other, "e")
        assert names_in(folder, "a", "b", "d", "e") == {"b", "d", "e"}


def test_what_was_just_built_is_in_use(small: PlanCache, folder: Path) -> None:
    put(small, key("a"), content("a", MIB))
    with PlanCache(folder, LIMIT) as other:
        fill(other, "b", "c", "d")
    assert names_in(folder, "a", "b", "c", "d") == {"a", "c", "d"}


def test_two_users_of_one_process_both_count(small: PlanCache, folder: Path) -> None:
    fill(small, "a", "b", "c")
    for _ in range(2):
        assert small.get(key("a")) is not None
    small.release(key("a"))
    os.utime(folder / "plans" / key("a").digest, ns=(0, 0))
    fill(small, "d")
    assert names_in(folder, "a", "b") == {"a"}
    small.release(key("a"))
    small.release(key("a"))  # once too often: nothing happens
    os.utime(folder / "plans" / key("a").digest, ns=(0, 0))
    fill(small, "e")
    assert names_in(folder, "a", "c", "d", "e") == {"c", "d", "e"}


def test_a_killed_user_uses_nothing(small: PlanCache, folder: Path) -> None:
    fill(small, "a", "b", "c")
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(killable(use_plan, folder, name)) for name in "abc"]
        assert all(each.hear() for each in users)
        fill(small, "d")
        assert names_in(folder, "a", "b", "c", "d") == {"a", "b", "c"}
        users[1].kill()
        fill(small, "d")
        assert names_in(folder, "a", "b", "c", "d") == {"a", "c", "d"}


def test_a_plan_larger_than_the_cache_costs_nobody_his(
    small: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(small, "a", "b")
    plan = put(small, key("large"), content("large", 4 * MIB))
    assert plan.data == content("large", 4 * MIB)
    assert names_in(folder, "a", "b", "large") == {"a", "b"}
    assert "is not kept: 4.0 MiB is more than the cache's limit of 3.1 MiB" in caplog.text


def test_a_smaller_limit_is_reached_at_the_next_plan(folder: Path) -> None:
    with PlanCache(folder, 10 * MIB) as large:
        fill(large, "a", "b", "c", "d")
    with PlanCache(folder, LIMIT) as small:
        fill(small, "e")
    assert names_in(folder, "a", "b", "c", "d", "e") == {"c", "d", "e"}
