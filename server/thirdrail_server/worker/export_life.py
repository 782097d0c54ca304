# SPDX-License-Identifier: Apache-2.0
"""The life of an export: it is offered with a token, taken by one importer, may be revoked, and
ends. `LIFE` is all there is to that.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from thirdrail_server.worker.tensor_memory import TensorMemory


class State(Enum):
    OFFERED = auto()  # a token is out
    TAKEN = auto()  # an importer has it
    REVOKED = auto()  # an importer has it mapped, and may not refer to it any more
    ENDED = auto()  # by this export nobody holds anything


class Event(Enum):
    TAKE = auto()
    REVOKE = auto()
    EXPIRE = auto()
    EXPORTER_ENDS = auto()
    IMPORTER_LEAVES = auto()  # it gave the tensor back, or has ended


LIFE: dict[tuple[State, Event], State] = {
    (State.OFFERED, Event.TAKE): State.TAKEN,
    (State.OFFERED, Event.REVOKE): State.ENDED,
    (State.OFFERED, Event.EXPIRE): State.ENDED,
    (State.OFFERED, Event.EXPORTER_ENDS): State.ENDED,
    (State.TAKEN, Event.REVOKE): State.REVOKED,
    (State.TAKEN, Event.IMPORTER_LEAVES): State.ENDED,
    (State.REVOKED, Event.IMPORTER_LEAVES): State.ENDED,
}  # whatever else happens changes nothing


def next_state(state: State, event: Event) -> State:
    return LIFE.get((state, event), state)


class Party(NamedTuple):
    """A session, by its number, and the user that it runs as."""

    session: int
    uid: int


@dataclass(frozen=True, slots=True)
class Tensor:
    size: int  # bytes, from the start of its memory
    data_type: int  # a thirdrail.v1.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an exporter asks for."""

    uid: int | None = None  # who may import; None: the exporter's own
    life_ms: int = 0  # until the token must have been used; 0: the default


@dataclass(slots=True, eq=False)
class Export:
    memory: TensorMemory
    tensor: Tensor
    exporter: int  # a session; 0: it has ended
    # The exports that it came of and itself at last, each with the session that may revoke it.
    lineage: tuple[tuple[int, int], ...]
    importer_uid: int
    token: bytes
    expires_ns: int
    state: State = State.OFFERED
    importer: int = 0  # a session; 0: none yet
    epoch: int = 0  # what the importer calls it

    @property
    def number(self) -> int:
        return self.lineage[-1][0]
