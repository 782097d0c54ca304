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
    state: State = State.FREE
    call: Hashable = None
    deadline_ns: int | None = None


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
        place = self._place(index, State.FREE, "a call")
        place.state, place.call, place.deadline_ns = State.PENDING, call, deadline_ns

    def ran(self, index: int) -> None:
        """The answer was sent: the results are the client's until it releases them."""
        place = self._places[index]
        assert place.state is State.RUNNING
        if not self._is_over:
            place.state = State.LEASED

    def release(self, index: int) -> None:
        """The client recorded `consumed` and said so."""
        self._place(index, State.LEASED, "a release").state = State.RELEASED

    def cancel(self, index: int) -> Hashable | None:
        """End a call that is still pending. None: it is not, and ends by itself."""
        place = self._places[index]
        if place.state is not State.PENDING:
            return None
        return _free(place)

    def end(self) -> list[Hashable]:
        """The session is over: returns the calls that were pending, which end now. What the device
        was given goes on, and `is_quiet` says when its memory may go."""
        self._is_over = True
        dropped = []
        for place in self._places:
            if place.state is State.PENDING:
                dropped.append(_free(place))
            elif place.state in (State.LEASED, State.RELEASED):
                # Nobody reads any more. The answer went out before the work was done, though.
                place.state = State.RUNNING
        return dropped

    def tick(self, now_ns: int, is_done: IsDone) -> list[Action]:
        """What can be done now. is_done: asks an event; not called for what nobody waits for."""
        actions: list[Action] = []
        for index, place in enumerate(self._places):
            if place.state is State.PENDING:
                actions += self._tick_pending(index, place, now_ns, is_done)
            elif self._is_unused(index, place, is_done):
                _free(place)
                actions.append(Reuse(index))
        return actions

    def _is_unused(self, index: int, place: _Place, is_done: IsDone) -> bool:
        """Never while the device writes, whatever the client says or records."""
        if place.state is State.RELEASED:
            return is_done(index, Kind.CONSUMED) and is_done(index, Kind.OUT_DONE)
        return self._is_over and place.state is State.RUNNING and is_done(index, Kind.OUT_DONE)

    @property
    def is_quiet(self) -> bool:
        """The device has nothing of this session left. Only after `end`."""
        return self._is_over and all(place.state is State.FREE for place in self._places)

    @property
    def wake_at_ns(self) -> int | None:
        """When the next pending call expires. While any place is asked about, tick more often."""
        deadlines = [
            place.deadline_ns
            for place in self._places
            if place.state is State.PENDING and place.deadline_ns is not None
        ]
        return min(deadlines, default=None)

    def _tick_pending(
        self, index: int, place: _Place, now_ns: int, is_done: IsDone
    ) -> list[Action]:
        if place.deadline_ns is not None and now_ns >= place.deadline_ns:
            return [Expire(index, _free(place))]
        if not is_done(index, Kind.IN_READY):
            return []
        place.state = State.RUNNING
        return [Enqueue(index, place.call)]

    def _place(self, index: int, expected: State, what: str) -> _Place:
        if not 0 <= index < len(self._places):
            raise InvalidArgument(
                f"{what} names place {index} of a ring of {len(self._places)} places"
            )
        place = self._places[index]
        if self._is_over or place.state is not expected:
            is_now = "the session is over" if self._is_over else place.state.value
            raise InvalidArgument(
                f"{what} names place {index}, expected one that is {expected.value}: {is_now}"
            )
        return place


def _free(place: _Place) -> Hashable:
    call, place.call = place.call, None
    place.state, place.deadline_ns = State.FREE, None
    return call
