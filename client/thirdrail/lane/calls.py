# SPDX-License-Identifier: Apache-2.0
"""One call in flight on a lane: what it holds, and what became of it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from thirdrail.errors import FailedPrecondition, ThirdrailError, TimedOut, Unavailable
from thirdrail.failures import with_note
from thirdrail.lane.places import Bytes, Place
from thirdrail.lane.turns import Ticket
from thirdrail.v1 import inference_pb2


class NotSent(Unavailable):
    """The session has ended, and the worker has not heard of this call: it may go another way."""


@dataclass(slots=True)
class Checksum:
    """Of an input that lies where the caller can still write. Debug mode takes it."""

    name: str
    memory: Bytes
    value: int

    @classmethod
    def of(cls, name: str, memory: Bytes) -> "Checksum":
        return cls(name, memory, zlib.crc32(memory.data))

    def fault(self) -> FailedPrecondition | None:
        """Why the result is worth nothing. To be asked while the memory is still taken."""
        if zlib.crc32(self.memory.data) == self.value:
            return None
        return FailedPrecondition(
            f"input '{self.name}' was written while the request was in flight: leave an array of "
            "client.empty() alone from infer or submit until its result is there"
        )


class Call(Ticket):
    """Done with a response, or with an error where there is none.

    places: the input memory that it reads.
    on_done: called by whoever reads, without any lock.
    """

    __slots__ = (
        "borrow", "checksums", "error", "is_abandoned", "number", "on_done", "places", "response",
    )  # fmt: skip

    def __init__(self, *, borrow: bool, on_done: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.borrow = borrow
        self.on_done = on_done
        self.number = 0
        self.places: list[Place] = []
        self.checksums: list[Checksum] = []
        self.response: inference_pb2.InferResponse | None = None
        self.error: ThirdrailError | None = None
        self.is_abandoned = False  # nobody will take the result

    def tell(self) -> None:
        """It is done. Once: whoever is told would otherwise be kept by what he keeps."""
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            on_done()

    @property
    def is_not_found(self) -> bool:
        """Whether the worker has no such model."""
        response = self.response
        return response is not None and response.status.reason == inference_pb2.REASON_NOT_FOUND


def timed_out(timeout: float | None) -> TimedOut:
    """What a caller gets whose own clock ran out first."""
    error = TimedOut(f"no answer within {timeout or 0:g} s")
    with_note(error)
    return error
