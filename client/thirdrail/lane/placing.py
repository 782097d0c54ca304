# SPDX-License-Identifier: Apache-2.0
"""Getting large inputs into the session's memory, for threads.

What lies there already goes by reference. All else is copied once, into places that a call gets all
together; when there is no room the worker is asked for more, and when it may not give any, a call
waits until another one ends.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from thirdrail.errors import ResourceExhausted
from thirdrail.failures import with_note
from thirdrail.lane.calls import Call, Checksum, NotSent, timed_out
from thirdrail.lane.encoding import LargeInput
from thirdrail.lane.places import Place, Role
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.lane.turns import Notice, Turns
from thirdrail.v1 import lane_pb2

Send = Callable[[lane_pb2.LaneRequest, float | None], None]


class _Growth(Notice):
    """A chunk that was asked for."""

    __slots__ = ("is_given_up", "place", "refusal")

    def __init__(self) -> None:
        super().__init__()
        self.place: Place | None = None  # of a chunk that was asked for alone
        self.refusal: str | None = None
        self.is_given_up = False  # nobody waits for it


class Placer:
    """The input memory of one session.

    lock: the lane's; it guards `memory` too.
    send: sends a packet; raises ThirdrailError when the lane has ended or the deadline passes.
    is_debug: take checksums of what goes by reference and can still be written.
    """

    def __init__(
        self,
        lock: threading.Lock,
        turns: Turns,
        memory: SessionMemory,
        send: Send,
        *,
        is_debug: bool,
    ) -> None:
        self._lock = lock
        self._turns = turns
        self._memory = memory
        self._send = send
        self._growth: _Growth | None = None  # one at a time
        self._room = Notice()  # done when a place becomes free
        self._has_ended = False
        self._is_debug = is_debug

    def place(
        self,
        call: Call,
        inputs: Sequence[LargeInput],
        deadline_s: float | None,
        timeout: float | None,
    ) -> list[bytes]:
        """Puts inputs where the worker reads them; their places are the call's from now on.

        Returns the inputs as fields of an InferRequest. Raises ResourceExhausted when there is and
        will be no room, TimedOut at the deadline, and NotSent when the lane has ended.
        """
        found = [self._find(call, large) for large in inputs]
        copied = [large for large, there in zip(inputs, found, strict=True) if there is None]
        if copied:
            places = self.reserve([large.array.nbytes for large in copied], deadline_s, timeout)
            call.places += places
            for large, place in zip(copied, places, strict=True):
                array = large.array
                native = array.dtype.newbyteorder("=")
                # Without holding up other threads: numpy lets go of the GIL here.
                np.copyto(place.memory.view(native).reshape(array.shape), array)
        fresh = iter(call.places[len(call.places) - len(copied) :])
        fields: list[bytes] = []
        for large, there in zip(inputs, found, strict=True):
            place, offset = there or (next(fresh), 0)
            fields.append(large.encode(place.ref(offset, large.array.nbytes)))
        return fields

    def reserve(
        self, sizes: Sequence[int], deadline_s: float | None, timeout: float | None
    ) -> list[Place]:
        """Places of so many bytes each. Raises like `place`."""
        while True:
            with self._lock:
                if self._has_ended:
                    raise NotSent("the lane has ended")
                if self._memory.collect():
                    self.room_freed()
                places = self._memory.reserve(sizes)
                if places is not None:
                    return places
                growth = self._growth
                size = None if growth else self._memory.growth_for(sizes)
                if size is not None:
                    growth = self._growth = _Growth()
                awaited = growth or self._room
            if size is not None:
                self._ask(lane_pb2.GrowRequest(size=size), deadline_s)
            if not self._turns.wait(awaited, deadline_s):
                raise timed_out(timeout)
            if size is not None and growth is not None and growth.refusal is not None:
                raise self._memory.with_holdings(ResourceExhausted(growth.refusal))

    def reserve_alone(self, size: int, deadline_s: float | None, timeout: float | None) -> Place:
        """A chunk for one tensor, which can be exported. Raises like `place`."""
        request = lane_pb2.GrowRequest(size=size, alone=True)
        place = self._grow(request, deadline_s, timeout).place
        if place is None:
            raise with_note(ResourceExhausted("the worker gave other memory"))
        return place

    def reserve_on_device(
        self,
        size: int,
        find: Callable[[], tuple[int, int] | None],
        deadline_s: float | None,
        timeout: float | None,
    ) -> tuple[int, int]:
        """What `find` finds, which is called with the lock held, after as many chunks on the device
        have come as that takes. Raises like `place`."""
        request = lane_pb2.GrowRequest(size=max(size, 1), on_device=True)
        found: list[tuple[int, int]] = []

        def has_found() -> bool:
            found.extend(filter(None, [find()]))
            return bool(found)

        while not found:
            self._grow(request, deadline_s, timeout, has_found)
        return found[0]

    def _grow(
        self,
        request: lane_pb2.GrowRequest,
        deadline_s: float | None,
        timeout: float | None,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> _Growth:
        """Ask for a chunk when nobody else does, and wait for it. Raises like `place`.

        is_enough: whether none is needed, asked with the lock held.
        """
        while True:
            with self._lock:
                if self._has_ended:
                    raise NotSent("the lane has ended")
                self._memory.collect()
                if is_enough():
                    return _Growth()
                other, growth = self._growth, _Growth()
                if other is None:
                    self._growth = growth
            if other is None:
                self._obtain(growth, request, deadline_s, timeout)
                return growth
            if not self._turns.wait(other, deadline_s):
                raise timed_out(timeout)

    def _obtain(
        self,
        growth: _Growth,
        request: lane_pb2.GrowRequest,
        deadline_s: float | None,
        timeout: float | None,
    ) -> None:
        self._ask(request, deadline_s)
        try:
            if not self._turns.wait(growth, deadline_s):
                raise timed_out(timeout)
        except BaseException:
            with self._lock:
                growth.is_given_up = True
                if growth.place is not None:  # it came in the very moment
                    self._memory.leave(growth.place)
            raise
        if growth.refusal is not None:
            raise self._memory.with_holdings(ResourceExhausted(growth.refusal))
        if self._has_ended:
            raise NotSent("the lane has ended")

    def _find(self, call: Call, large: LargeInput) -> tuple[Place, int] | None:
        """Where the input lies in the session's memory, taken for the call; None: elsewhere."""
        array = large.array
        if not len(self._memory.shown) or not (array.flags.c_contiguous and array.dtype.isnative):
            return None
        with self._lock:
            found = self._memory.find(array)
            if found is None:
                return None
            place, offset = found
            place.users += 1
            call.places.append(place)
        if self._is_debug and place.role in (Role.INPUT, Role.ALONE):
            memory = place.memory[offset : offset + array.nbytes]
            call.checksums.append(Checksum.of(large.name, memory))
        return found

    def _ask(self, grow: lane_pb2.GrowRequest, deadline_s: float | None) -> None:
        try:
            self._send(lane_pb2.LaneRequest(grow=grow), deadline_s)
        except BaseException:
            with self._lock:
                self.chunk_came(None)  # others ask for themselves
            raise

    # Called by whoever reads, with the lock held

    def chunk_came(self, alone: Place | None) -> None:
        growth, self._growth = self._growth, None
        if alone is not None and (growth is None or growth.is_given_up):
            self._memory.leave(alone)
        if growth is not None:
            growth.place = alone
            self._turns.complete(growth)

    def refused(self, message: str) -> None:
        growth, self._growth = self._growth, None
        if growth is not None:
            growth.refusal = message
            self._turns.complete(growth)

    def room_freed(self) -> None:
        room, self._room = self._room, Notice()
        self._turns.complete(room)

    def end(self) -> None:
        self._has_ended = True
        if self._growth is not None:
            self._turns.complete(self._growth)
        self._turns.complete(self._room)
