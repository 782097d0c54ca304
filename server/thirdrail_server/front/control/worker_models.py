# SPDX-License-Identifier: Apache-2.0
"""What one worker loads and has loaded: its gates, its memory budget, and its deaths.

Everything here is asked for in the model's turn. A worker swaps a model in one step, so a load that
fails there changes nothing but what is told.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from thirdrail.errors import (
    Cancelled,
    Internal,
    NotFound,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.v1 import metrics_pb2
from thirdrail_server.config import ControlLimits, MemoryBudget, WorkerConfig
from thirdrail_server.control_messages import (
    LoadedModel,
    LoadProgress,
    message_of_text,
)
from thirdrail_server.front.announcements import shortened
from thirdrail_server.front.control.catalog import EVICTED, Catalog
from thirdrail_server.front.control.counters import CounterBook
from thirdrail_server.front.control.load_source import LoadSource, PreparedLoad
from thirdrail_server.front.control.orders import Order
from thirdrail_server.front.control.placement import Need, mib
from thirdrail_server.front.control.restarts import LoadLedger, Verdict
from thirdrail_server.front.control.room import RoomMaker
from thirdrail_server.front.control.supervisor import Supervisor, WorkerDied, WorkerNews
from thirdrail_server.front.control.turns import LoadGate, Turns
from thirdrail_server.front.control.worker_load import TellProgress, TooLarge, load_in_worker

_log = logging.getLogger(__name__)


class Desk(Protocol):
    """Whom this worker's models are ordered from."""

    turns: Turns

    @property
    def workers(self) -> "Sequence[WorkerModels]":
        """All that there are."""
        ...

    def comes_back(self, worker: str, name: str, source: LoadSource) -> None:
        """The worker died, and the model served from this source there."""
        ...

    async def let_go(self, name: str, source: LoadSource | None) -> None:
        """A model does not serve from this source any more, as far as this worker is concerned."""
        ...


class WorkerModels:
    """Of one worker. `start`, then whatever is asked; whoever made the supervisor stops it."""

    def __init__(
        self,
        config: WorkerConfig,
        limits: ControlLimits,
        budget: MemoryBudget,
        catalog: Catalog,
        worker: Supervisor,
        desk: Desk,
    ) -> None:
        self._limits = limits
        self._budget = budget
        self._catalog = catalog
        self._worker = worker
        self._desk = desk
        compiling_loads_max = config.compiling.loads_at_once_max
        self._gate = LoadGate(config.loads_at_once_max + compiling_loads_max)
        # Of their own: they wait for builds, for which nobody else shall wait.
        self._improvements = LoadGate(compiling_loads_max)
        self._ledger: LoadLedger[LoadSource] = LoadLedger()
        self._counters = CounterBook()
        self._room = RoomMaker(
            budget,
            worker,
            is_held=desk.turns.is_taken,
            evict=self._evict,
            unload=self._unload_to_reload,
        )
        self.evictions = 0
        catalog.expect_worker(worker.name)

    @property
    def name(self) -> str:
        return self._worker.name

    @property
    def is_up(self) -> bool:
        return self._worker.is_up

    async def wait_until_up(self) -> None:
        await self._worker.wait_until_up()

    async def wait_until_tried(self) -> None:
        await self._worker.wait_until_tried()

    def start(self) -> None:
        """Start the worker."""
        self._worker.start(WorkerNews(self._on_started, self._on_died))

    def serves_from(self, name: str) -> LoadSource | None:
        """What a model serves from here."""
        return self._ledger.source_of(name)

    def uses(self, name: str, repository: Path) -> bool:
        source = self._ledger.source_of(name)
        return source is not None and source.repository == repository

    def verdict(self, name: str) -> Verdict:
        """About a load that failed because the worker died."""
        return self._ledger.verdict(name)

    async def cancel_loads(self, name: str | None) -> None:
        """End the builds of a model. None: of all models, for good."""
        with contextlib.suppress(ThirdrailError):  # no worker: nothing is built
            await self._worker.ask("cancel loads", {} if name is None else {"name": name})

    async def counters(self) -> list[metrics_pb2.ModelCounters]:
        """Of every model version since the server started; they never decrease."""
        try:
            texts = (await self._worker.ask("counters"))["models"]
            self._counters.observe(
                [message_of_text(metrics_pb2.ModelCounters, text) for text in texts]
            )
        except ThirdrailError:
            pass  # no worker to ask: what was known stays true
        except (KeyError, TypeError, ValueError) as error:
            _log.error("worker '%s' sent counters that cannot be read: %r", self.name, error)
        return self._counters.totals()

    async def status(self) -> metrics_pb2.WorkerStatus:
        """Figures of the worker; those that only it knows are 0 while it does not answer."""
        status = await self._worker.status()
        status.evictions = self.evictions
        status.model_bytes_max = self._budget.bytes_max
        return status

    # The worker's life

    def _on_started(self) -> None:
        self._catalog.worker_started(self.name)

    def _on_died(self, how: str) -> None:
        aftermath = self._ledger.on_death()
        self._counters.restart()
        names = [name for name, _source in aftermath.lost]
        self._catalog.worker_died(self.name, (*names, *aftermath.retried))
        if names:
            _log.warning(
                "not served by worker '%s' until it is there again: %s", self.name, shortened(names)
            )
        for name, source in aftermath.lost:
            self._desk.comes_back(self.name, name, source)

    # Loading

    async def load(
        self, order: Order, prepared: PreparedLoad, instances: int, progress: TellProgress
    ) -> LoadedModel:
        """Load a model's part, as often as it takes. Raises Cancelled, Internal,
        ResourceExhausted, and Unavailable for an order that is not patient.
        """
        is_patient, is_alone, name = order.is_patient, False, order.name
        gate = self._improvements if order.improves else self._gate
        while True:
            async with contextlib.AsyncExitStack() as permit:
                with order.waiting():
                    if is_patient:
                        await self.wait_until_up()
                    entry = gate.alone() if is_alone else gate.shared()
                    leave = await permit.enter_async_context(entry)
                if is_patient and not self.is_up:
                    continue
                tell = progress if order.improves else _leaving(leave, progress)
                try:
                    return await self._load_once(order, prepared, instances, tell)
                except WorkerDied as death:
                    if order.improves:
                        raise
                    verdict = self._ledger.verdict(name)
                    if verdict is Verdict.BROKEN:
                        reason = f"worker died while loading it: {death.how}"
                        self._catalog.fail_load(name, reason, self.name)
                        raise Internal(f"failed to load '{name}', {reason}") from None
                    is_patient, is_alone = True, verdict is Verdict.RETRY_ALONE
                except Unavailable:
                    if not is_patient:
                        raise

    async def _load_once(
        self, order: Order, prepared: PreparedLoad, instances: int, progress: TellProgress
    ) -> LoadedModel:
        name = order.name
        order.require_wanted()
        if not self.is_up:
            raise Unavailable(f"failed to load '{name}': worker '{self.name}' is being restarted")
        command = replace(
            prepared.command,
            takes_stopgap=not order.improves,
            memory_bytes_max=self._budget.bytes_max,
            instances=instances,
        )
        self._catalog.begin_load(name, dict(command.versions), self.name)
        try:
            prepared = replace(prepared, command=command)
            loaded = order.settled(await self._load_with_room(order, prepared, progress))
        except Unavailable:  # the worker is gone, or about to: its death is told elsewhere
            self._ledger.fail(name)
            raise
        except Cancelled as error:
            self._ledger.fail(name)
            self._catalog.cancel_load(name, self.name)
            order.require_wanted()  # in its own words
            raise Cancelled(f"loading '{name}' ended early: {error}") from None
        except ThirdrailError as error:
            self._ledger.fail(name)
            self._catalog.fail_load(name, error.message, self.name)
            kind = ResourceExhausted if isinstance(error, ResourceExhausted) else Internal
            raise kind(f"failed to load '{name}', no version is available: {error}") from None
        except BaseException:
            self._ledger.fail(name)
            raise
        before = self._ledger.succeed(name, order.source)
        self._catalog.end_load(name, loaded, self.name, instances)
        where = f" in worker '{self.name}'" if len(self._desk.workers) > 1 else ""
        versions = ", ".join(map(str, loaded.ready_versions))
        _log.info("model '%s' serves%s, version %s", name, where, versions)
        await self._desk.let_go(name, before)
        return loaded

    async def _load_with_room(
        self, order: Order, prepared: PreparedLoad, progress: TellProgress
    ) -> LoadedModel:
        """Once more where it turns out larger than its files are, with the figure that is known
        then. A build never interrupts what serves until it is done."""
        name, may_interrupt = order.name, prepared.command.takes_stopgap

        def tell(told: LoadProgress) -> None:
            self._catalog.tell_phase(name, told.phase, self.name)
            self._ledger.note(name, is_building=told.is_building)
            progress(told)

        need = Need(name, prepared.files_bytes)
        while True:
            async with self._room.made(need, may_interrupt=may_interrupt):
                order.require_wanted()
                self._ledger.begin(name)
                try:
                    return await load_in_worker(self._worker, prepared, tell)
                except TooLarge as error:
                    self._ledger.fail(name)
                    if need.is_measured:
                        text = f"it takes {mib(error.size)}, which others took meanwhile"
                        raise ResourceExhausted(text) from None
                    need = Need(name, error.size, is_measured=True)

    # Unloading

    async def unload(self, name: str) -> ThirdrailError | None:
        """Returns what went wrong; the model is gone all the same. Nothing happens where it does
        not serve."""
        source = self._ledger.forget(name)
        if source is None:
            return None
        failure = await self._unload(name)
        await self._desk.let_go(name, source)
        return failure

    async def _unload(self, name: str) -> ThirdrailError | None:
        try:
            await self._worker.call("unload", {"name": name})
        except (Unavailable, NotFound):
            pass  # the worker, or the model in it, is gone: that is what was asked for
        except ThirdrailError as error:
            _log.error("model '%s' was not unloaded cleanly: %s", name, error)
            return error
        return None

    async def _unload_to_reload(self, name: str) -> None:
        """There is no room for what serves and what is loaded beside it."""
        self._catalog.interrupt(name, self.name)
        await self.unload(name)

    async def _evict(self, name: str, needy: str) -> bool:
        """Take an idle model out of memory for another one. False: it is not idle any more."""
        if self._desk.turns.is_taken(name):
            return False
        async with self._desk.turns.of(name):
            answer = await self._worker.call("evict", {"name": name})
            if not answer.get("evicted"):
                return False
            source = self._ledger.forget(name)
            reason = f"{EVICTED} '{needy}'; load it to use it again"
            self._catalog.end_unload(name, reason, self.name)
            await self._desk.let_go(name, source)
        self.evictions += 1
        _log.warning("model '%s' was %s '%s'", name, EVICTED, needy)
        return True


def _leaving(leave: Callable[[], None], progress: TellProgress) -> TellProgress:
    """Who waits for a build holds up no other load."""

    def tell(told: LoadProgress) -> None:
        if told.is_building:
            leave()
        progress(told)

    return tell
