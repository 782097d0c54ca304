# SPDX-License-Identifier: Apache-2.0
"""Which runs are recorded as a CUDA graph, and which graphs are kept. Pure code.

A graph holds the shapes and the addresses that it was recorded with, so these are its key. A key
is recorded when it comes the second time: the first run settles what the library decides on new
shapes, which must not be recorded, and most keys of a model with open sizes never come again.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Recording = TypeVar("Recording")


class Way(Enum):
    """How a run is to be given to the device."""

    PLAIN = "by the library's own call"
    RECORD = "recorded into a graph, which is then launched"
    LAUNCH = "by launching the graph"


@dataclass(slots=True)
class GraphFigures:
    kept: int = 0
    recorded: int = 0
    launched: int = 0
    refused: int = 0  # keys that cannot be recorded


class GraphCache(Generic[Recording]):
    """graphs_max: how many are kept; 0 for none. As many keys again are remembered without."""

    def __init__(self, graphs_max: int) -> None:
        self._graphs_max = graphs_max
        self._graphs: OrderedDict[Hashable, Recording] = (
            OrderedDict()
        )  # the least recently used first
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # and whether it may be recorded
        self.figures = GraphFigures()

    def way(self, key: Hashable) -> Way:
        """How to do this run. RECORD is followed by `keep` or by `refuse`."""
        if not self._graphs_max:
            return Way.PLAIN
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self.figures.launched += 1
            return Way.LAUNCH
        may_record = self._seen.get(key)
        if may_record is None:
            self._remember(key, may_record=True)
            return Way.PLAIN
        self._seen.move_to_end(key)
        return Way.RECORD if may_record else Way.PLAIN

    def graph(self, key: Hashable) -> Recording:
        return self._graphs[key]

    def keep(self, key: Hashable, graph: Recording) -> list[Recording]:
        """Take a new graph in. Returns those that had to go, which the caller closes."""
        self._seen.pop(key, None)
        self._graphs[key] = graph
        self.figures.recorded += 1
        gone = []
        while len(self._graphs) > self._graphs_max:
            _, oldest = self._graphs.popitem(last=False)
            gone.append(oldest)
        self.figures.kept = len(self._graphs)
        return gone

    def refuse(self, key: Hashable) -> None:
        """It could not be recorded, and is not tried again."""
        self.figures.refused += 1
        self._remember(key, may_record=False)

    def clear(self) -> list[Recording]:
        """Forget everything. Returns the graphs, which the caller closes."""
        gone = list(self._graphs.values())
        self._graphs.clear()
        self._seen.clear()
        self.figures.kept = 0
        return gone

    def _remember(self, key: Hashable, *, may_record: bool) -> None:
        self._seen[key] = may_record
        self._seen.move_to_end(key)
        while len(self._seen) > self._graphs_max:
            self._seen.popitem(last=False)
