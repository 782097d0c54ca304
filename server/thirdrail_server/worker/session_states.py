# SPDX-License-Identifier: Apache-2.0
"""The life of a lane session: the one table of its states, and nothing else.

A token is issued (OPENING), a hello carries it (ATTACHED), the client asks for something (ACTIVE).
From the first sign of its end the session takes nothing new, and what runs for it finishes
(DRAINING). Then its memory is kept apart (QUARANTINE) until the client has let go of it: its
process may still be there, reading what it has mapped. What is then given back (FREED) was never,
and will never be, another session's.

A client lets go by a `Close`, by dying, or, where its process cannot be watched, by a grace time.
"""

from enum import Enum, auto

from thirdrail.v1 import sessions_pb2


class State(Enum):
    OPENING = sessions_pb2.SESSION_STATE_OPENING
    ATTACHED = sessions_pb2.SESSION_STATE_ATTACHED
    ACTIVE = sessions_pb2.SESSION_STATE_ACTIVE
    DRAINING = sessions_pb2.SESSION_STATE_DRAINING
    QUARANTINE = sessions_pb2.SESSION_STATE_QUARANTINE
    FREED = sessions_pb2.SESSION_STATE_FREED


class Event(Enum):
    HELLO = auto()  # with a good token
    USE = auto()  # the client asks for memory, or sends a request
    END = auto()  # whoever's wish: end of file, death, a broken rule, a quota, our own stop
    IDLE = auto()  # nothing of ours uses the session's memory any more
    LET_GO = auto()  # nor does the client


_NEXT: dict[tuple[State, Event], State] = {
    (State.OPENING, Event.HELLO): State.ATTACHED,
    (State.OPENING, Event.END): State.DRAINING,  # which takes no time: it had nothing yet
    (State.ATTACHED, Event.USE): State.ACTIVE,
    (State.ATTACHED, Event.END): State.DRAINING,
    (State.ACTIVE, Event.USE): State.ACTIVE,
    (State.ACTIVE, Event.END): State.DRAINING,
    (State.DRAINING, Event.IDLE): State.QUARANTINE,
    (State.QUARANTINE, Event.LET_GO): State.FREED,
}
# News of an end come from several sides, late, twice and in any order.
_ALWAYS_ALLOWED = frozenset({Event.END, Event.LET_GO})

OPEN = frozenset({State.OPENING, State.ATTACHED, State.ACTIVE})


class Life:
    """Where one session is."""

    __slots__ = ("has_let_go", "state")

    def __init__(self) -> None:
        self.state = State.OPENING
        self.has_let_go = False  # remembered where it comes before our own runs are done

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    def on(self, event: Event) -> State:
        """The state afterwards. Raises ValueError for what cannot happen: our own mistake."""
        following = _NEXT.get((self.state, event))
        if following is None and event not in _ALWAYS_ALLOWED:
            raise ValueError(f"{event.name} cannot come in {self.state.name}")
        self.has_let_go |= event is Event.LET_GO
        self.state = following or self.state
        if self.state is State.QUARANTINE and self.has_let_go:
            self.state = State.FREED
        return self.state
