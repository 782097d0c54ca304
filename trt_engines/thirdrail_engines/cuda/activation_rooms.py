# SPDX-License-Identifier: Apache-2.0
"""How much memory the contexts on a device share for what they compute in between. Pure code.

A room is memory for one run at a time. There are as many as the model with the most contexts has,
and no fewer than ROOMS_MIN, and they are as large as the largest contexts are. So the contexts of a
model that is alone compute side by side, and all rooms together never take more than contexts with
memory of their own would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Two: a short run finds room beside a long one of another model.
ROOMS_MIN = 2


@dataclass(frozen=True, slots=True)
class Contexts:
    """Those of one model. nbytes: what a run of one needs at most."""

    nbytes: int
    count: int


def room_sizes(models: Iterable[Contexts]) -> list[int]:
    """In bytes, the largest first. For each model there are as many that fit as it has contexts."""
    users = [model for model in models if model.nbytes]
    needs = sorted((model.nbytes for model in users for _ in range(model.count)), reverse=True)
    return needs[: max([ROOMS_MIN, *(model.count for model in users)])]


@dataclass(frozen=True, slots=True)
class Change:
    """new: bytes of rooms to make. surplus: which of the old ones are needed no more."""

    new: tuple[int, ...]
    surplus: tuple[int, ...]


def change_of(sizes: Sequence[int], wanted: Sequence[int]) -> Change:
    """From rooms of these sizes to such that each wanted one (the largest first) has one of at
    least its size. What is here stays where it will do, the smallest that does."""
    left = sorted(range(len(sizes)), key=lambda room: sizes[room])
    new = []
    for size in wanted:
        fitting = next((room for room in left if sizes[room] >= size), None)
        if fitting is None:
            new.append(size)
        else:
            left.remove(fitting)
    return Change(tuple(new), tuple(left))


@dataclass(frozen=True, slots=True)
class RoomState:
    """Of a room that nobody holds. is_own: who asks was the last to have it, so that runs there
    are in order anyway. is_idle: the device is done with it. turn: when it was lent last."""

    nbytes: int
    is_own: bool
    is_idle: bool
    turn: int


def best_room(rooms: Sequence[RoomState], nbytes: int) -> int | None:
    """Which to lend for a run of that need; None: none of them fits."""
    fitting = [number for number, room in enumerate(rooms) if room.nbytes >= nbytes]
    return min(fitting, key=lambda number: _badness(rooms[number]), default=None)


def _badness(room: RoomState) -> tuple[bool, bool, int]:
    # Of idle ones the smallest, which leaves the larger to others; of busy ones the one that is
    # likely to be free first.
    return not room.is_own, not room.is_idle, room.nbytes if room.is_idle else room.turn
