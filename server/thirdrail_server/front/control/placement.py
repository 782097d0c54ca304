# SPDX-License-Identifier: Apache-2.0
"""Whether a load fits a worker's memory budget, and what makes room for it. Pure arithmetic.

All figures are bytes of engines: what they hold while nothing runs. Arenas have bounds of their
own. Before a load a model's figure is the size of its files; afterwards the worker weighs it, see
worker/memory.py.

The order of preference, for a model that serves already as well (a swap):
  1. It fits beside all that is loaded, its own old engine included: the swap overlaps.
  2. `over_budget` evict: idle models leave, the least recently used first.
  3. `swap` unload-first: its own old engine leaves before the new one comes, and others as in 2.
  4. It is refused, and nothing has changed.
A model leaves only if it is idle, that is: no request waits or runs, none of its own loads is under
way, and its last load or request lies `spared_s` back. None leaves that need not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thirdrail_server.config import MemoryBudget, OverBudget, SwapOverBudget
from thirdrail_server.control_messages import Resident

MODELS_TOLD_MAX = 5
MS_PER_S = 1000


@dataclass(frozen=True, slots=True)
class Need:
    """What is to be loaded."""

    model: str
    size: int  # bytes
    is_measured: bool = False  # it was loaded and found too large; otherwise `size` is an estimate


@dataclass(frozen=True, slots=True)
class Room:
    """It may be loaded, once the others have left."""

    evict: tuple[str, ...] = ()  # least recently used first
    unload_first: bool = False  # its own old engine


@dataclass(frozen=True, slots=True)
class NoRoom:
    text: str  # with all figures


def decide(
    need: Need,
    residents: Sequence[Resident],
    taken_bytes: int,
    budget: MemoryBudget,
    now_ms: int,
) -> Room | NoRoom:
    """residents: `need.model` is among them if it serves. taken_bytes: what others have, which are
    loads under way, engines that were replaced and still finish requests, and what models share.
    """
    in_use = taken_bytes + sum(each.size for each in residents)
    own = sum(each.size for each in residents if each.name == need.model)
    others = [each for each in residents if each.name != need.model]
    ways = [(in_use, False)]
    if own and budget.swap is SwapOverBudget.UNLOAD_FIRST:
        ways.append((in_use - own, True))
    for used, unload_first in ways:
        shortage = used + need.size - budget.bytes_max
        victims = _victims(others, shortage, budget, now_ms)
        if victims is not None:
            return Room(tuple(each.name for each in victims), unload_first)
    return NoRoom(_refusal(need, residents, in_use, budget, now_ms))


def _victims(
    others: Iterable[Resident], shortage: int, budget: MemoryBudget, now_ms: int
) -> list[Resident] | None:
    """Who leaves, in order; None: it would not be enough."""
    if shortage <= 0:
        return []
    if budget.over_budget is not OverBudget.EVICT:
        return None
    chosen: list[Resident] = []
    for each in sorted(others, key=lambda each: (each.used_ms, each.name)):
        if shortage > 0 and each.size and _is_idle(each, budget, now_ms):
            chosen.append(each)
            shortage -= each.size
    if shortage > 0:
        return None
    for each in reversed(chosen[:-1]):  # a large one that came last may be enough without some
        if shortage + each.size <= 0:
            chosen.remove(each)
            shortage += each.size
    return chosen


def _is_idle(resident: Resident, budget: MemoryBudget, now_ms: int) -> bool:
    return not resident.is_busy and now_ms - resident.used_ms >= budget.spared_s * MS_PER_S


def _refusal(
    need: Need, residents: Sequence[Resident], in_use: int, budget: MemoryBudget, now_ms: int
) -> str:
    how = "measured" if need.is_measured else "estimated from its files"
    text = f"it needs {mib(need.size)} ({how})"
    if need.size > budget.bytes_max:
        return f"{text}, more than the whole memory budget of {mib(budget.bytes_max)}"
    text += f", and {mib(in_use)} of the memory budget of {mib(budget.bytes_max)} are in use"
    largest = sorted(residents, key=lambda each: (-each.size, each.name))
    told = [_told(each, budget, now_ms) for each in largest[:MODELS_TOLD_MAX]]
    more = len(residents) - len(told)
    if told:
        text += f": {', '.join(told)}" + (f" and {more} more" if more > 0 else "")
    return text


def _told(resident: Resident, budget: MemoryBudget, now_ms: int) -> str:
    text = f"'{resident.name}' {mib(resident.size)}"
    if budget.over_budget is not OverBudget.EVICT or _is_idle(resident, budget, now_ms):
        return text
    why = "busy" if resident.is_busy else f"used less than {budget.spared_s} s ago"
    return f"{text} ({why})"


def mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
