# SPDX-License-Identifier: Apache-2.0
"""Pieces of a session's memory that arrays show: found again by address, given back by collection.

An array is recognised by where it lies, so a view, a torch tensor or a memoryview over it counts
like the array itself. The collector may run a finaliser anywhere, inside our own lock too: so a
finaliser here is `deque.append` and nothing else, and whoever holds the lock next takes what was
noted. numpy shortens a chain of bases to a plain array's; the base that tells when the last view is
gone is therefore an object of its own kind, the anchor.
"""

import weakref
from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from thirdrail.lane.allocator import ALIGNMENT_BYTES
from thirdrail.v1.tensor_pb2 import ArenaRef

Bytes = npt.NDArray[np.uint8]


class Role(Enum):
    INPUT = "input"  # a piece of the input arena
    ALONE = "alone"  # an input chunk of its own, which can be exported
    OUTPUT = "output"  # a leased slot
    IMPORTED = "imported"  # another session's tensor


@dataclass(slots=True, eq=False)
class Place:
    """A piece of memory, and what a reference to it says. Two places are never equal.

    memory: its bytes, which keep the mapping alive.
    users: the array over it, and each call in flight that reads it.
    """

    role: Role
    memory: Bytes
    epoch: int
    chunk: int
    offset: int
    size: int
    slot: int = 0
    generation: int = 0
    users: int = 1
    address: int = 0
    is_shown: bool = False

    def ref(self, offset: int, size: int) -> ArenaRef:
        """`offset`: bytes from the start of this place."""
        return ArenaRef(
            epoch=self.epoch,
            chunk=self.chunk,
            offset=self.offset + offset,
            size=size,
            slot=self.slot,
            generation=self.generation,
        )


class Anchor:
    """The base of every array over one place. numpy reads the memory's address from it."""

    __slots__ = ("__array_interface__", "__weakref__", "_memory")

    def __init__(self, memory: Bytes, *, writable: bool) -> None:
        self._memory = memory
        self.__array_interface__: dict[str, Any] = {
            "shape": memory.shape,
            "typestr": "|u1",
            "data": (address_of(memory), not writable),
            "version": 3,
        }


class _Watch(weakref.ref[Anchor]):
    """A weak reference that knows its place. Its callback is a deque's append.

    The place does not know it: such a cycle would keep memory that nobody uses any more.
    """

    __slots__ = ("place",)
    place: Place


class ShownPlaces:
    """The places that arrays of the caller show. The lane's lock guards everything here, except
    what collection adds to `_collected`.
    """

    def __init__(self) -> None:
        self._by_address: list[_Watch] = []
        self._collected: deque[_Watch | Place] = deque()

    def __len__(self) -> int:
        return len(self._by_address)

    def count(self, role: Role) -> int:
        return sum(watch.place.role is role for watch in self._by_address)

    def held_bytes(self, *roles: Role) -> int:
        """What arrays keep. Needs no lock."""
        places = [watch.place for watch in list(self._by_address)]
        return sum(place.size for place in places if place.role in roles)

    @property
    def has_collected(self) -> bool:
        return bool(self._collected)

    def show(self, place: Place, *, writable: bool) -> Bytes:
        """An array over the place, which is noted as collected when the last view of it is gone."""
        anchor = Anchor(place.memory, writable=writable)
        place.address = address_of(place.memory)
        place.is_shown = True
        watch = _Watch(anchor, self._collected.append)
        watch.place = place
        insort(self._by_address, watch, key=_ADDRESS)
        return np.asarray(anchor)

    def find(self, address: int, size: int) -> Place | None:
        """The place that holds these bytes, if a reference can name them."""
        index = bisect_right(self._by_address, address, key=_ADDRESS) - 1
        if index < 0:
            return None
        place = self._by_address[index].place
        offset = address - place.address
        if offset + size > place.size or (place.offset + offset) % ALIGNMENT_BYTES:
            return None
        return place

    def let_go(self, place: Place) -> None:
        """Count the arrays as gone, though somebody may have them. Needs no lock: it only notes."""
        if place.is_shown:
            self._collected.append(place)

    def forget(self, place: Place) -> bool:
        """No longer find it, nor hear of its collection. False: it was forgotten before."""
        if not place.is_shown:
            return False
        place.is_shown = False
        index = bisect_right(self._by_address, place.address, key=_ADDRESS) - 1
        assert self._by_address[index].place is place
        del self._by_address[index]
        return True

    def take_collected(self) -> list[Place]:
        """Those whose arrays are gone since the last time, forgotten now."""
        taken: list[Place] = []
        while self._collected:
            noted = self._collected.popleft()
            place = noted if isinstance(noted, Place) else noted.place
            if self.forget(place):
                taken.append(place)
        return taken


_ADDRESS = attrgetter("place.address")


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's first element lies."""
    address: int = array.__array_interface__["data"][0]
    return address
