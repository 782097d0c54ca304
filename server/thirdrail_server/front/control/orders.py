# SPDX-License-Identifier: Apache-2.0
"""Loads that are to be done, from the wish to the end, and which of them nobody wants any more.

An order waits for much: its model's turn, a gate, a worker that is down. What ends it early ends
such a wait at once; a load that a worker has begun is ended there.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from thirdrail.errors import Cancelled
from thirdrail_server.control_messages import LoadedModel
from thirdrail_server.front.control.load_source import LoadSource


@dataclass(slots=True, eq=False)
class Order:
    """A load to be done.

    worker: the model's part there alone; empty: all of it.
    is_patient: it waits for a worker that is not there.
    improves: the model serves, from the same source, and gets the engine that had to be built.
    settles_for: why the engine that can serve at once has to do, for good.
    """

    name: str
    source: LoadSource
    worker: str = ""
    is_patient: bool = False
    improves: bool = False
    settles_for: str = ""
    has_read: bool = False  # its files, or is about to
    _why_not: str = ""
    _waiting: set[asyncio.Task[object]] = field(default_factory=set)

    def settled(self, loaded: LoadedModel) -> LoadedModel:
        """What came of it, as it is to be told."""
        if not self.settles_for:
            return loaded
        engines = {
            version: replace(engine, reason=self.settles_for, is_stopgap=False)
            if engine.is_stopgap
            else engine
            for version, engine in loaded.engines.items()
        }
        return replace(loaded, engines=engines)

    def end(self, why: str) -> None:
        """It is not wanted any more."""
        self._why_not = self._why_not or why
        for task in self._waiting:
            task.cancel()

    def require_wanted(self) -> None:
        """Raises Cancelled after `end`. To be asked before a worker is: it cancels nothing that it
        does not know."""
        if self._why_not:
            raise Cancelled(f"loading '{self.name}' ended early: {self._why_not}")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """`end` ends what is awaited here. Raises Cancelled then."""
        self.require_wanted()
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._why_not:
                task.uncancel()
            self.require_wanted()
            raise
        finally:
            self._waiting.discard(task)


class Orders:
    """Those that have not ended."""

    def __init__(self) -> None:
        self._live: dict[str, set[Order]] = {}  # by model

    def add(self, order: Order) -> None:
        self._live.setdefault(order.name, set()).add(order)

    def remove(self, order: Order) -> None:
        live = self._live.get(order.name, set())
        live.discard(order)
        if not live:
            self._live.pop(order.name, None)

    def end(self, name: str, why: str) -> None:
        """All of a model."""
        for order in list(self._live.get(name, ())):
            order.end(why)

    def end_asked(self, why: str) -> None:
        """Those of callers, who wait for them."""
        for order in [each for live in self._live.values() for each in live]:
            if not order.is_patient:
                order.end(why)

    def end_improvements(self, name: str, why: str, worker: str = "") -> bool:
        """Of a model, in one worker or in all. Whether there were some."""
        found = [
            order
            for order in self._live.get(name, ())
            if order.improves and worker in ("", order.worker)
        ]
        for order in found:
            order.end(why)
        return bool(found)

    def will_read(self, name: str, source: LoadSource) -> bool:
        """Whether one of all of a model has yet to read its files from there."""
        return any(
            order.source == source and not (order.has_read or order.worker or order._why_not)
            for order in self._live.get(name, ())
        )

    def end_parts(self, name: str, source: LoadSource, why: str) -> None:
        """Of a model, those for single workers that would load it from another source."""
        for order in list(self._live.get(name, ())):
            if order.worker and order.source is not source:
                order.end(why)

    def need(self, name: str, repository: Path) -> bool:
        """Whether one of them is to load the model from there."""
        return any(order.source.repository == repository for order in self._live.get(name, ()))
