# SPDX-License-Identifier: Apache-2.0
"""Fair turns: the order of requests that have the same rank."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator

from thirdrail_server.worker.queued import Queued


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
