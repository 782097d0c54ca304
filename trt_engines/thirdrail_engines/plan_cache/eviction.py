# SPDX-License-Identifier: Apache-2.0
"""Which entries make room for a new one. Pure: no clock, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Occupant:
    """Something in the cache. used_ns: when it was last used, by the clock of file systems."""

    digest: str
    size_bytes: int
    used_ns: int
    is_in_use: bool = False


def victims(
    occupants: Sequence[Occupant], bytes_max: int, bytes_needed: int
) -> list[Occupant] | None:
    """The least recently used ones whose going makes `bytes_needed` fit under `bytes_max`.

    Never one in use. None when no choice is enough: then nothing should go in vain.
    """
    excess = sum(each.size_bytes for each in occupants) + bytes_needed - bytes_max
    chosen: list[Occupant] = []
    idle = (each for each in occupants if not each.is_in_use)
    for each in sorted(idle, key=lambda each: (each.used_ns, each.digest)):
        if excess <= 0:
            break
        chosen.append(each)
        excess -= each.size_bytes
    return chosen if excess <= 0 else None
