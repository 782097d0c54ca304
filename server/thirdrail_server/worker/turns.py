# SPDX-License-Identifier: Apache-2.0
"""Fair turns: the order of requests that have the same rank."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

NEVER_NS = 2**63 - 1


@dataclass(slots=True, eq=False)
class Queued:
    """What scheduling knows of a request. Times are monotonic nanoseconds.

    The fields of the second part belong to the queue that the request waits in.
    """

    key: Any  # hashable, the caller's own handle; no two requests that have not ended share one
    flow: Hashable  # who gets turns: a session, a connection
    priority: int  # as QueuePolicy.resolve_priority gave it
    rows: int  # 1 or more, at most QueuePolicy.rows_max if that is not 0
    signature: Hashable  # what must be equal within a batch, e.g. the shapes without the batch axis
    arrived_ns: int
    deadline_ns: int | None = None  # the caller's; nobody wants the answer at this time or later
    timeout_ns: int | None = None  # the policy's; passing it ends or delays the request

    number: int = field(default=0, init=False)  # in order of arrival
    rank: int | None = field(default=None, init=False)  # None: it does not wait
    ends_ns: int = field(default=NEVER_NS, init=False)  # the nearer of its deadlines still ahead
    due_ns: int = field(default=NEVER_NS, init=False)  # when it should stop waiting for company

    @property
    def is_waiting(self) -> bool:
        return self.rank is not None


class Turns:
    """Flows in a line, each with its requests; see the rules "turns" and "deadline" in queue.py."""

    __slots__ = ("_flows",)

    def __init__(self) -> None:
        # In each flow, sorted: (ends_ns, number, request). No flow is empty.
        self._flows: OrderedDict[Hashable, list[tuple[int, int, Queued]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[Queued]:
        """Every flow's first request, then every flow's second, and so on."""
        others = []
        for flow in self._flows.values():
            yield flow[0][2]
            if len(flow) > 1:
                others.append(flow)
        place = 1
        while others:
            for flow in others:
                yield flow[place][2]
            place += 1
            others = [flow for flow in others if len(flow) > place]

    def add(self, queued: Queued) -> None:
        insort(self._flows.setdefault(queued.flow, []), (queued.ends_ns, queued.number, queued))

    def remove(self, queued: Queued, *, is_turn: bool) -> None:
        """Take out a request. is_turn: if it was its flow's first, that was the flow's turn."""
        flow = self._flows[queued.flow]
        place = bisect_left(flow, (queued.ends_ns, queued.number))
        del flow[place]
        if not flow:
            del self._flows[queued.flow]
        elif is_turn and place == 0:
            self._flows.move_to_end(queued.flow)
