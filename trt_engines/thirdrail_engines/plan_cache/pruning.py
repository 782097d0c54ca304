# SPDX-License-Identifier: Apache-2.0
"""Removing entries because somebody asked for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thirdrail_engines.plan_cache import eviction
from thirdrail_engines.plan_cache.inventory import Entry, entries, fault_of
from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.store import Store
from thirdrail_engines.plan_cache.workspaces import sweep


@dataclass(frozen=True, slots=True)
class Pruning:
    """What goes: whatever any of these chooses.

    bytes_max: the least recently used, until the rest is no more than this.
    """

    digests: frozenset[str] = frozenset()
    bytes_max: int | None = None
    used_before_ns: int | None = None
    damaged: bool = False
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Pruned:
    """swept: how many killed users' folders went."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    freed_bytes: int = 0
    swept: int = 0


def prune_folder(layout: Layout, pruning: Pruning, *, is_dry: bool = False) -> Pruned:
    """Remove what is chosen and not in use. Raises LockTimeout, OSError."""
    if is_dry:
        return _outcome(_chosen(entries(layout), pruning, layout), swept=0)
    store = Store(layout, bytes_max=0)
    swept = sweep(layout.work)
    # Plans are read before others have to wait for us.
    damaged = _damaged(entries(layout), layout) if pruning.damaged else frozenset()
    pruning = replace(pruning, damaged=False, digests=pruning.digests | damaged)
    with store.changing():
        chosen = _chosen(entries(layout), pruning, layout)
        # Somebody may just have begun to use one.
        tried = [replace(e, is_in_use=not store.remove(e.digest)) for e in chosen]
    return _outcome(tried, swept=swept)


def _chosen(found: Sequence[Entry], pruning: Pruning, layout: Layout) -> list[Entry]:
    wanted = set(pruning.digests)
    if pruning.everything:
        wanted |= {each.digest for each in found}
    if pruning.used_before_ns is not None:
        wanted |= {each.digest for each in found if each.used_ns < pruning.used_before_ns}
    if pruning.damaged:
        wanted |= _damaged(found, layout)
    if pruning.bytes_max is not None:
        wanted |= _surplus(found, wanted, pruning.bytes_max)
    return [each for each in found if each.digest in wanted]


def _surplus(found: Sequence[Entry], going: set[str], bytes_max: int) -> set[str]:
    left = [
        eviction.Occupant(each.digest, each.size_bytes, each.used_ns, each.is_in_use)
        for each in found
        if each.digest not in going
    ]
    chosen = eviction.victims(left, bytes_max, 0)
    if chosen is None:  # even without all idle ones it is too much
        chosen = [each for each in left if not each.is_in_use]
    return {each.digest for each in chosen}


def _damaged(found: Sequence[Entry], layout: Layout) -> frozenset[str]:
    plans = (each for each in found if not each.has_only_notes)
    return frozenset(each.digest for each in plans if fault_of(layout, each.digest))


def _outcome(chosen: Sequence[Entry], *, swept: int) -> Pruned:
    gone = [each for each in chosen if not each.is_in_use]
    return Pruned(
        removed=[each.digest for each in gone],
        in_use=[each.digest for each in chosen if each.is_in_use],
        freed_bytes=sum(each.size_bytes for each in gone),
        swept=swept,
    )
