# SPDX-License-Identifier: Apache-2.0
"""Who may have more arena memory when it is short, and whose session ends for it. Pure decisions.

A fair share is a bound divided by the sessions that it is for. While there is room everybody may
have more. When there is none, whoever stays within the fair share gets it at the cost of the
session that holds most above; anybody else is refused. Time plays no part: a client may hold
results for as long as nobody needs the memory.

The memory of a session that has ended still counts, as its client may still have it mapped, but
nobody else is ended while that much is on its way back.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from thirdrail_server.config import SessionLimits


@dataclass(frozen=True, slots=True)
class Holder:
    """One session's memory. name: how people know it, e.g. "session 7 (pid 12, uid 1000, 'x')"."""

    session: int
    uid: int
    size: int  # bytes
    has_ended: bool
    name: str


@dataclass(frozen=True, slots=True)
class Granted:
    pass


@dataclass(frozen=True, slots=True)
class Refused:
    text: str


@dataclass(frozen=True, slots=True)
class ComesBack:
    """Not now: enough is about to be given back."""

    text: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """Not now, but `victim` must end, of which this is its goodbye."""

    victim: int
    goodbye: str
    text: str


Decision = Granted | Refused | ComesBack | Evicted


def decide(
    needy: Holder, size: int, holders: Collection[Holder], limits: SessionLimits
) -> Decision:
    """holders: all, the needy one included."""
    pools: tuple[tuple[str, int, Callable[[Holder], bool]], ...] = (
        (
            f"uid {needy.uid}",
            limits.arena_bytes_per_uid_max,
            lambda holder: holder.uid == needy.uid,
        ),
        ("all clients together", limits.arena_bytes_total_max, lambda _: True),
    )
    for whose, bytes_max, is_in in pools:
        pool = [holder for holder in holders if is_in(holder)]
        decision = _decide_in(pool, needy, size, bytes_max, whose)
        if not isinstance(decision, Granted):
            return decision
    return Granted()


def _decide_in(
    pool: Collection[Holder], needy: Holder, size: int, bytes_max: int, whose: str
) -> Decision:
    used = sum(holder.size for holder in pool)
    if used + size <= bytes_max:
        return Granted()
    asked = f"{size} more bytes of shared memory were asked for; {whose} may have {bytes_max}"
    largest = max(pool, key=lambda holder: holder.size)
    refused = Refused(f"{asked} and have {used}, most of it {largest.name}: {largest.size}")
    coming = [holder for holder in pool if holder.has_ended]
    coming_bytes = sum(holder.size for holder in coming)
    if coming_bytes and used - coming_bytes + size <= bytes_max:
        slowest = max(coming, key=lambda holder: holder.size)
        return ComesBack(
            f"{asked} and have {used}; {coming_bytes} are of sessions that have ended and whose "
            f"clients still have them, most of it {slowest.name}; try again"
        )
    share = bytes_max // sum(not holder.has_ended for holder in pool)
    if needy.size + size > share:
        return refused
    victim = max(
        (holder for holder in pool if not holder.has_ended and holder is not needy),
        key=lambda holder: holder.size,
        default=None,
    )
    if victim is None or victim.size <= share:
        return refused
    return Evicted(
        victim.session,
        goodbye=(
            f"{victim.name} ends: it held {victim.size} bytes of shared memory, more than its fair "
            f"share of {share}, and another session needed {size}"
        ),
        text=(
            f"{asked} and have {used}; {victim.name} held {victim.size}, more than its fair share "
            f"of {share}, and was ended to make room; try again"
        ),
    )
