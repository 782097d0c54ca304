# SPDX-License-Identifier: Apache-2.0
"""A request on its way through a model version, and how it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thirdrail_server.worker.members import Member, Outcome

if TYPE_CHECKING:
    from thirdrail_server.worker.served_version import ServedVersion


@dataclass(slots=True)
class Ending:
    """How a call ended, and where its time went. Times are nanoseconds."""

    outcome: Outcome
    queue_ns: int = 0
    input_copy_ns: int = 0
    compute_ns: int = 0
    output_copy_ns: int = 0
    batch_rows: int = 0


@dataclass(slots=True, eq=False)
class Call:
    """A request on its way through a model version, and who is told of its end.

    on_run: called in place of on_ended on the thread that ran it alone, for those who can answer
        there. One of the two is called, once.
    """

    member: Member
    served: "ServedVersion"
    on_ended: Callable[["Call", Ending], None]
    arrived_ns: int
    on_run: Callable[["Call", Ending], None] | None = None
    started_ns: int = field(default=0, init=False)
    _rights: list[None] = field(default_factory=lambda: [None], init=False)

    def claim(self) -> bool:
        """True for the first who asks, on whatever thread: that one answers."""
        try:
            self._rights.pop()
        except IndexError:
            return False
        return True

    def cancel(self) -> None:
        """End it with Cancelled, unless it has ended."""
        self.served.cancel(self)
