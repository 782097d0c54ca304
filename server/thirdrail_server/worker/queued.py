# SPDX-License-Identifier: Apache-2.0
"""What scheduling knows of a request."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

NEVER_NS = 2**63 - 1


@dataclass(slots=True, eq=False)
class Queued:
    """A request on its way through a queue. Times are monotonic nanoseconds.

    The fields of the second part belong to the queue that the request waits in.
    """

    key: Any  # hashable, the caller's own handle; no two requests that have not ended share one
    flow: Hashable  # who gets turns: a session, a connection
    priority: int  # as QueuePolicy.resolve_priority gave it
    rows: int  # 1 or more, at most QueuePolicy.rows_max if that is not 0
    signature: Hashable  # what must be equal within a batch, e.g. the shapes without the batch axis
    arrived_ns: int
    deadline_ns: int | None = None  # the caller's; nobody wants the answer at this time or later
    timeout_ns: int | None = None  # the policy's; passing it ends or delays the request, then None

    number: int = field(default=0, init=False)  # in order of arrival
    rank: int | None = field(default=None, init=False)  # None: it does not wait
    ends_ns: int = field(
        default=NEVER_NS, init=False
    )  # its nearest_end_ns, as the lists are sorted by it
    due_ns: int = field(default=NEVER_NS, init=False)  # when it should stop waiting for company

    @property
    def is_waiting(self) -> bool:
        return self.rank is not None

    @property
    def nearest_end_ns(self) -> int:
        """The nearer of its two deadlines, NEVER_NS without any."""
        return min(
            NEVER_NS if self.deadline_ns is None else self.deadline_ns,
            NEVER_NS if self.timeout_ns is None else self.timeout_ns,
        )
