# SPDX-License-Identifier: Apache-2.0
"""Who gets arena memory when it is short, and who ends for it. All pure."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from thirdrail_server.config import SessionLimits
from thirdrail_server.worker.quotas import (
    ComesBack,
    Decision,
    Evicted,
    Granted,
    Holder,
    Refused,
    decide,
)

LIMITS = SessionLimits(arena_bytes_total_max=100, arena_bytes_per_uid_max=60)


def holders(*sizes: int, ended: Sequence[int] = (), uids: Sequence[int] = ()) -> list[Holder]:
    """One session for each size, numbered from 1; each of a uid of its own where none is said."""
    numbered = enumerate(sizes, start=1)
    return [
        Holder(n, uids[n - 1] if uids else n, size, n in ended, f"session {n} (pid 1{n})")
        for n, size in numbered
    ]


def asked(size: int, held: list[Holder], limits: SessionLimits = LIMITS) -> Decision:
    """By the last one."""
    return decide(held[-1], size, held, limits)


def test_while_there_is_room_anybody_may_have_it() -> None:
    assert asked(40, holders(50, 10, 0)) == Granted()
    assert asked(1, holders(0, 59)) == Granted()


def test_the_largest_above_its_share_ends_for_one_within_its_own() -> None:
    decision = asked(10, holders(45, 50, 0))
    assert isinstance(decision, Evicted)
    assert decision.victim == 2
    assert decision.goodbye == (
        "session 2 (pid 12) ends: it held 50 bytes of shared memory, more than its fair share of "
        "33, and another session needed 10"
    )
    assert decision.text == (
        "10 more bytes of shared memory were asked for; all clients together may have 100 and have "
        "95; session 2 (pid 12) held 50, more than its fair share of 33, and was ended to make "
        "room; try again"
    )


def test_nobody_ends_for_one_who_wants_more_than_its_share() -> None:
    decision = asked(34, holders(45, 50, 0))
    assert decision == Refused(
        "34 more bytes of shared memory were asked for; all clients together may have 100 and have "
        "95, most of it session 2 (pid 12): 50"
    )
    assert isinstance(asked(33, holders(45, 50, 0)), Evicted)


def test_nobody_ends_who_stays_within_the_fair_share() -> None:
    assert isinstance(asked(4, holders(33, 33, 31)), Refused)


def test_nobody_ends_while_enough_is_on_its_way_back() -> None:
    decision = asked(10, holders(45, 50, 0, ended=[1]))
    assert isinstance(decision, ComesBack)
    assert "45 are of sessions that have ended" in decision.text
    assert "most of it session 1 (pid 11); try again" in decision.text


def test_a_second_one_ends_where_the_first_ones_memory_is_not_enough() -> None:
    decision = asked(25, holders(20, 60, 20, 0, ended=[1]))
    assert isinstance(decision, Evicted)
    assert decision.victim == 2


def test_the_sessions_of_one_user_end_for_each_other_and_for_nobody_else() -> None:
    held = holders(30, 30, 0, uids=[1, 2, 2])
    limits = SessionLimits(arena_bytes_total_max=1000, arena_bytes_per_uid_max=30)
    decision = asked(10, held, limits)
    assert isinstance(decision, Evicted)
    assert decision.victim == 2
    assert "uid 2 may have 30 and have 30" in decision.text
    assert isinstance(asked(10, holders(30, 0, uids=[1, 2]), limits), Granted)


def test_one_who_is_alone_is_refused_at_the_bound() -> None:
    assert isinstance(asked(61, holders(0)), Refused)
    assert isinstance(asked(1, holders(60)), Refused)


sizes = st.lists(st.integers(0, 120), min_size=1, max_size=8)


@given(
    sizes,
    st.integers(1, 120),
    st.sets(st.integers(1, 7)),
    st.lists(st.integers(1, 3), min_size=8, max_size=8),
)
def test_the_bounds_hold_and_only_the_greedy_end(
    held_sizes: list[int], size: int, ended: set[int], uids: list[int]
) -> None:
    held = holders(*held_sizes, ended=sorted(ended - {len(held_sizes)}), uids=uids)
    needy = held[-1]
    decision = asked(size, held)
    own = sum(each.size for each in held if each.uid == needy.uid)
    total = sum(held_sizes)
    fits = total + size <= 100 and own + size <= 60
    assert isinstance(decision, Granted) == fits
    if isinstance(decision, Evicted):
        victim = held[decision.victim - 1]
        assert victim is not needy
        assert not victim.has_ended
        assert victim.size > needy.size
        if own + size > 60:
            assert victim.uid == needy.uid
