# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the memory budget: what fits, who leaves, what a refusal says."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thirdrail_server.config import MemoryBudget, OverBudget, SwapOverBudget
from thirdrail_server.control_messages import Resident
from thirdrail_server.front.control.placement import Need, NoRoom, Room, decide

MIB = 1 << 20
NOW_MS = 1_000_000

sizes = st.integers(0, 100)
residents = st.lists(
    st.builds(Resident, st.sampled_from("abcdefgh"), sizes, st.integers(0, 30_000), st.booleans()),
    unique_by=lambda each: each.name,
    max_size=8,
)
budgets = st.builds(
    MemoryBudget,
    st.integers(1, 300),
    st.sampled_from(OverBudget),
    st.sampled_from(SwapOverBudget),
    st.integers(0, 20),
)
needs = st.builds(Need, st.sampled_from("abcxyz"), sizes)


def megabytes(**of: int) -> list[Resident]:
    """Models that were last used long ago, in this order."""
    return [Resident(name, n * MIB, place) for place, (name, n) in enumerate(of.items())]


def budget(mib: int, **settings: Any) -> MemoryBudget:
    return MemoryBudget(mib * MIB, **settings)


EVICT: dict[str, Any] = {"over_budget": OverBudget.EVICT}
UNLOAD_FIRST: dict[str, Any] = {"swap": SwapOverBudget.UNLOAD_FIRST}


@settings(deadline=None)
@given(needs, residents, sizes, budgets)
def test_what_is_let_in_fits_and_harms_nobody_in_vain(
    need: Need, loaded: list[Resident], leaving: int, limits: MemoryBudget
) -> None:
    now_ms = 30_000
    decision = decide(need, loaded, leaving, limits, now_ms)
    if isinstance(decision, NoRoom):
        return
    by_name = {each.name: each for each in loaded}
    gone = {*decision.evict, *((need.model,) if decision.unload_first else ())}
    left = leaving + sum(each.size for each in loaded if each.name not in gone)
    assert left + need.size <= limits.bytes_max
    for name in decision.evict:
        victim = by_name[name]
        assert limits.over_budget is OverBudget.EVICT
        assert name != need.model
        assert not victim.is_busy
        assert now_ms - victim.used_ms >= limits.spared_s * 1000
        assert left + victim.size + need.size > limits.bytes_max, "it need not have left"
    if decision.unload_first:
        assert limits.swap is SwapOverBudget.UNLOAD_FIRST
        assert need.model in by_name


@settings(deadline=None)
@given(needs, residents, sizes, budgets)
def test_nothing_is_refused_that_some_allowed_way_would_fit(
    need: Need, loaded: list[Resident], leaving: int, limits: MemoryBudget
) -> None:
    now_ms = 30_000
    decision = decide(need, loaded, leaving, limits, now_ms)
    may_leave = {
        each.name
        for each in loaded
        if limits.over_budget is OverBudget.EVICT
        and each.name != need.model
        and not each.is_busy
        and now_ms - each.used_ms >= limits.spared_s * 1000
    }
    if limits.swap is SwapOverBudget.UNLOAD_FIRST:
        may_leave.add(need.model)
    least = leaving + sum(each.size for each in loaded if each.name not in may_leave)
    assert isinstance(decision, Room) == (least + need.size <= limits.bytes_max)


def test_what_fits_evicts_nobody_and_overlaps() -> None:
    loaded = megabytes(a=2, m=3)
    decision = decide(Need("m", 4 * MIB), loaded, MIB, budget(10, **EVICT, **UNLOAD_FIRST), NOW_MS)
    assert decision == Room()


def test_the_least_recently_used_leave_first_and_none_that_need_not() -> None:
    loaded = megabytes(oldest=1, older=3, newest=5)
    assert decide(Need("m", 2 * MIB), loaded, 0, budget(10, **EVICT), NOW_MS) == Room(("oldest",))
    assert decide(Need("m", 4 * MIB), loaded, 0, budget(10, **EVICT), NOW_MS) == Room(("older",))
    assert decide(Need("m", 9 * MIB), loaded, 0, budget(10, **EVICT), NOW_MS) == Room(
        ("older", "newest")
    )


def test_an_old_engine_leaves_first_only_where_nobody_else_could() -> None:
    loaded = megabytes(a=4, m=4)
    need = Need("m", 5 * MIB)
    both = budget(10, **EVICT, **UNLOAD_FIRST)
    assert decide(need, loaded, 0, both, NOW_MS) == Room(("a",))
    assert decide(need, loaded, 0, budget(10, **UNLOAD_FIRST), NOW_MS) == Room(unload_first=True)
    assert decide(Need("m", 9 * MIB), loaded, 0, both, NOW_MS) == Room(("a",), unload_first=True)


def test_a_refusal_has_all_figures() -> None:
    loaded = [
        Resident("busy", 4 * MIB, 0, is_busy=True),
        Resident("new", 3 * MIB, NOW_MS - 9000),
        Resident("idle", MIB, 0),
    ]
    decision = decide(Need("m", 5 * MIB), loaded, 0, budget(9, **EVICT), NOW_MS)
    assert decision == NoRoom(
        "it needs 5.0 MiB (estimated from its files), and 8.0 MiB of the memory budget of 9.0 MiB "
        "are in use: 'busy' 4.0 MiB (busy), 'new' 3.0 MiB (used less than 10 s ago), 'idle' 1.0 MiB"
    )
    decision = decide(Need("m", 10 * MIB, is_measured=True), [], 0, budget(9), NOW_MS)
    assert decision == NoRoom(
        "it needs 10.0 MiB (measured), more than the whole memory budget of 9.0 MiB"
    )


def test_a_refusal_names_the_largest_and_counts_the_rest() -> None:
    loaded = [Resident(f"m{n}", n * MIB, 0) for n in range(1, 9)]
    decision = decide(Need("m", 5 * MIB), loaded, 0, budget(36), NOW_MS)
    assert isinstance(decision, NoRoom)
    assert decision.text.endswith(
        "'m8' 8.0 MiB, 'm7' 7.0 MiB, 'm6' 6.0 MiB, 'm5' 5.0 MiB, 'm4' 4.0 MiB and 3 more"
    )


@pytest.mark.parametrize("evicts", [True, False])
def test_what_is_still_leaving_counts(evicts: bool) -> None:
    limits = budget(10, **(EVICT if evicts else {}))
    assert isinstance(decide(Need("m", 5 * MIB), [], 6 * MIB, limits, NOW_MS), NoRoom)
