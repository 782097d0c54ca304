# SPDX-License-Identifier: Apache-2.0
"""The order of work between a client's stream and the server's, without the host waiting. Pure.

A session has a ring of triples of events, all created by the server: `in_ready` is recorded by the
client when its inputs are written, `out_done` by the server when the results are, `consumed` by the
client when it has read them. An event's wait means its last record at the time of the call, and
one that was never recorded counts as done: so record, then send the message, then ask.

One rule above all: the server's stream, which computes for everybody, never waits for an event
that a client records. A client that dies would stop it for good. So `in_ready` is asked until it is
done, and only then is the call given to the device; the client may wait for `out_done`, since it
trusts its server.

    FREE -> PENDING -> RUNNING -> LEASED -> RELEASED -> FREE
            in_ready is asked                consumed and out_done are asked

A client cannot see when a place that it released is free, so the place's next call may come before:
it waits there, and is pending from then on.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum

from thirdrail.errors import InvalidArgument


class State(Enum):
    FREE = "free"
    PENDING = "its inputs are not ready"
    RUNNING = "given to the device"
    LEASED = "the client has the results"
    RELEASED = "the client may still read the results"


class Kind(Enum):
    IN_READY = "in_ready"
    OUT_DONE = "out_done"
    CONSUMED = "consumed"


@dataclass(frozen=True, slots=True)
class Enqueue:
    """The inputs are ready: give the call to the device, record out_done, answer, and say `ran`."""

    index: int
    call: Hashable


@dataclass(frozen=True, slots=True)
class Expire:
    """The inputs were not ready in time: the call ends, and never touched the device."""

    index: int
    call: Hashable


@dataclass(frozen=True, slots=True)
class Reuse:
    """Nobody reads or writes the results' memory any more."""

    index: int


Action = Enqueue | Expire | Reuse
IsDone = Callable[[int, Kind], bool]


@dataclass(slots=True)
class _Place:
    """call: the one that runs here, or is to; of a RELEASED place, the next one."""

    state: State = State.FREE
    call: Hashable = None
    deadline_ns: int | None = None
    is_read: bool = False  # RELEASED: by the client, so that `consumed` counts


class EventRing:
    """The server's view of one session's ring. What a client says wrongly raises InvalidArgument,
    and changes nothing."""

    def __init__(self, size: int) -> None:
        self._places = [_Place() for _ in range(size)]
        self._is_over = False

    def state(self, index: int) -> State:
        return self._places[index].state

    def arrive(self, index: int, call: Hashable, deadline_ns: int | None) -> None:
        """A call came, with its place in the ring. The next `tick` may act on it."""
        place = self._place(index, "a call", State.FREE, State.RELEASED)
        if place.call is not None:
            raise InvalidArgument(f"a call names place {index}, where another one waits already")
        place.call, place.deadline_ns = call, deadline_ns
        if place.state is State.FREE:
            place.state = State.PENDING

    def ran(self, index: int) -> None:
        """The answer was sent: the results are the client's until it releases them."""
        place = self._places[index]
        assert place.state is State.RUNNING
        if not self._is_over:
            place.state, place.call = State.LEASED, None

    def dropped(self, index: int) -> None:
        """The call ended without results that the client could release."""
        place = self._places[index]
        assert place.state is State.RUNNING
        if not self._is_over:
            place.state, place.call, place.is_read = State.RELEASED, None, False

    def release(self, index: int) -> None:
        """The client recorded `consumed` and said so."""
        place = self._place(index, "a release", State.LEASED)
        place.state, place.is_read = State.RELEASED, True

    def cancel(self, index: int) -> Hashable | None:
        """End a call that is still pending. None: it is not, and ends by itself."""
        place = self._places[index]
        if place.state not in (State.PENDING, State.RELEASED):
            return None
        return _take_call(place)

    def end(self) -> list[Hashable]:
        """The session is over: returns the calls that were pending, which end now. What the device
        was given goes on, and `is_quiet` says when its memory may go."""
        self._is_over = True
        dropped = []
        for place in self._places:
            if place.state in (State.PENDING, State.RELEASED) and place.call is not None:
                dropped.append(_take_call(place))
            if place.state in (State.LEASED, State.RELEASED):
                # Nobody reads any more. The answer went out before the work was done, though.
                place.state = State.RUNNING
        return dropped

    def tick(self, now_ns: int, is_done: IsDone) -> list[Action]:
        """What can be done now. is_done: asks an event; not called for what nobody waits for."""
        actions: list[Action] = []
        for index, place in enumerate(self._places):
            if place.state is State.FREE or place.state is State.LEASED:
                continue
            if self._is_unused(index, place, is_done):
                place.state = State.FREE if place.call is None or self._is_over else State.PENDING
                actions.append(Reuse(index))
            if place.state is State.PENDING or place.state is State.RELEASED:
                actions += self._tick_pending(index, place, now_ns, is_done)
        return actions

    def _is_unused(self, index: int, place: _Place, is_done: IsDone) -> bool:
        """Never while the device writes, whatever the client says or records."""
        if place.state is State.RELEASED:
            is_read = not place.is_read or is_done(index, Kind.CONSUMED)
            return is_read and is_done(index, Kind.OUT_DONE)
        return self._is_over and place.state is State.RUNNING and is_done(index, Kind.OUT_DONE)

    @property
    def is_idle(self) -> bool:
        """Nothing is to be asked: only what a client or the end of a run says can change it."""
        return all(
            place.state in (State.FREE, State.RUNNING, State.LEASED) for place in self._places
        )

    @property
    def is_quiet(self) -> bool:
        """The device has nothing of this session left. Only after `end`."""
        return self._is_over and all(place.state is State.FREE for place in self._places)

    @property
    def wake_at_ns(self) -> int | None:
        """When the next call that waits expires. Tick more often, unless `is_idle`."""
        deadlines = [
            place.deadline_ns
            for place in self._places
            if place.state is not State.RUNNING and place.deadline_ns is not None
        ]
        return min(deadlines, default=None)

    def _tick_pending(
        self, index: int, place: _Place, now_ns: int, is_done: IsDone
    ) -> list[Action]:
        if place.call is None:
            return []
        if place.deadline_ns is not None and now_ns >= place.deadline_ns:
            return [Expire(index, _take_call(place))]
        if place.state is State.RELEASED or not is_done(index, Kind.IN_READY):
            return []
        place.state, place.deadline_ns = State.RUNNING, None
        return [Enqueue(index, place.call)]

    def _place(self, index: int, what: str, *expected: State) -> _Place:
        if not 0 <= index < len(self._places):
            raise InvalidArgument(
                f"{what} names place {index} of a ring of {len(self._places)} places"
            )
        place = self._places[index]
        if self._is_over or place.state not in expected:
            is_now = "the session is over" if self._is_over else place.state.value
            wanted = " or ".join(state.value for state in expected)
            raise InvalidArgument(
                f"{what} names place {index}, expected one that is {wanted}: {is_now}"
            )
        return place


def _take_call(place: _Place) -> Hashable:
    """The call does not wait here any more."""
    call, place.call, place.deadline_ns = place.call, None, None
    if place.state is State.PENDING:
        place.state = State.FREE
    return call
