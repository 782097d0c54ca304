# SPDX-License-Identifier: Apache-2.0
"""Carries out orders: each in its model's turn, in all the workers that the model runs on.

What a worker does is in worker_models.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from thirdrail.errors import Internal, NotFound, ThirdrailError, Unavailable
from thirdrail_server.config import ServerConfig
from thirdrail_server.control_messages import LoadedModel, LoadProgress
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.engine_book import EngineBook
from thirdrail_server.front.control.load_source import (
    LoadSource,
    ModelMissing,
    PreparedLoad,
    prepare,
)
from thirdrail_server.front.control.orders import Order, Orders
from thirdrail_server.front.control.restarts import Verdict
from thirdrail_server.front.control.supervisor import Supervisor, WorkerDied
from thirdrail_server.front.control.turns import Turns
from thirdrail_server.front.control.uploads import Uploads
from thirdrail_server.front.control.worker_load import TellProgress
from thirdrail_server.front.control.worker_models import WorkerModels
from thirdrail_server.front.devices import memory_budget, worker_config
from thirdrail_server.front.statuses import INTERNAL_TEXT
from thirdrail_server.repository.device_choice import Device, devices_of
from thirdrail_server.repository.errors import RepositoryError

T = TypeVar("T")
Placed = list[tuple[WorkerModels, int]]  # where a model belongs, with how many instances

UNLOADED_MEANWHILE = "the model was unloaded meanwhile"
STOPPING = "the server is stopping"
LOADED_MEANWHILE = "the model was loaded again meanwhile"

STARTING_TOGETHER_S_MAX = 10.0

_log = logging.getLogger(__name__)


def _to_nobody(_progress: LoadProgress) -> None:
    """A TellProgress for loads that nobody waits for."""


class ModelLoads:
    """Of all workers. Give it orders; `await stop()`."""

    def __init__(
        self,
        config: ServerConfig,
        catalog: Catalog,
        workers: Mapping[Device, Supervisor],
        uploads: Uploads,
    ) -> None:
        self._catalog = catalog
        self._uploads = uploads
        self.turns = Turns(config.control.waiting_per_model_max)
        self._orders = Orders()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.engines = EngineBook()
        self._gpus = tuple(device for device in workers if device.uuid)
        self._workers = {
            device.worker: WorkerModels(
                worker_config(config, device),
                config.control,
                memory_budget(config, device),
                catalog,
                worker,
                self,
            )
            for device, worker in workers.items()
        }

    @property
    def workers(self) -> Sequence[WorkerModels]:
        return list(self._workers.values())

    async def stop(self) -> None:
        """Give all of them up."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def order(self, order: Order, progress: TellProgress = _to_nobody) -> asyncio.Task[list[int]]:
        """Have one done. From now on it can be ended."""
        self._orders.add(order)
        work = self._improve(order) if order.improves else self._load(order, progress)
        task = self.spawn(work)
        task.add_done_callback(lambda _: self._orders.remove(order))
        return task

    def will_read(self, name: str, source: LoadSource) -> bool:
        """Whether a load that was ordered will find what lies there now."""
        return self._orders.will_read(name, source)

    async def end(self, name: str) -> None:
        """All loads of a model that were asked for until now, for its unload."""
        self._orders.end(name, UNLOADED_MEANWHILE)
        await self.cancel_in_workers(name)

    async def end_all(self) -> None:
        """For good: builds, and what callers wait for. All else ends with `stop`."""
        self._orders.end_asked(STOPPING)
        await self.cancel_in_workers(None)

    async def end_improvements(self, name: str) -> None:
        """For a load that is to take their place."""
        if self._orders.end_improvements(name, LOADED_MEANWHILE):
            await self.cancel_in_workers(name)

    async def cancel_in_workers(self, name: str | None) -> None:
        """End the builds of a model; None: of all models, for good."""
        await asyncio.gather(*(each.cancel_loads(name) for each in self.workers))

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Until `stop`. What it fails by is logged, where nobody is told."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def _load(self, order: Order, progress: TellProgress = _to_nobody) -> list[int]:
        """Load in the model's turn. Returns the versions that serve because of it."""
        name = order.name
        try:
            async with contextlib.AsyncExitStack() as turn:
                with order.waiting():
                    # Not in the turn: others need not wait for a worker.
                    if order.worker:
                        await self._workers[order.worker].wait_until_up()
                    elif order.is_patient:
                        await self._until_started()
                    its_turn = self.turns.of(name, is_callers=not order.is_patient)
                    await turn.enter_async_context(its_turn)
                loaded = await self._load_in_turn(order, progress)
        except ThirdrailError as error:
            _log.warning("%s", error)
            raise
        except Exception:
            _log.exception("loading '%s' failed", name)
            self._catalog.fail_load(name, INTERNAL_TEXT, order.worker)
            raise Internal(f"failed to load '{name}': {INTERNAL_TEXT}") from None
        finally:
            self._orders.remove(order)
            await self.let_go(name, order.source)
        return sorted({version for each in loaded.values() for version in each.ready_versions})

    async def _until_started(self) -> None:
        """So that all parts of a model are loaded at once. Who takes longer gets his part later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STARTING_TOGETHER_S_MAX):
                for each in self.workers:
                    await each.wait_until_tried()

    async def _load_in_turn(
        self, order: Order, progress: TellProgress
    ) -> dict[WorkerModels, LoadedModel]:
        """Returns what serves now where. Parts for workers that are down come later, if they may.

        Raises what went wrong where no part was loaded.
        """
        name = order.name
        progress(LoadProgress("reading"))
        prepared, placed = await self._prepare(order)
        order.require_wanted()
        here = [(each, count) for each, count in placed if each.is_up]
        if not here and not order.is_patient:
            names = " and ".join(f"'{each.name}'" for each, _count in placed)
            raise Unavailable(f"failed to load '{name}': worker {names} is being restarted")
        if order.is_patient:
            self._order_later(order, [each for each, _count in placed if not each.is_up])
        if not here:
            return {}
        loading = [self.spawn(each.load(order, prepared, n, progress)) for each, n in here]
        await asyncio.wait(loading)
        loaded: dict[WorkerModels, LoadedModel] = {}
        failures: dict[WorkerModels, ThirdrailError] = {}
        for (each, _count), task in zip(here, loading, strict=True):
            try:
                loaded[each] = task.result()
            except ThirdrailError as error:
                failures[each] = error
        if not loaded:
            raise next(iter(failures.values()))
        _log_reservations(order, loaded.values())
        if not order.worker:
            await self._leave_others(order, failures, placed)
        if not order.is_patient:
            self._order_later(order, [each for each, _count in placed if each not in dict(here)])
        for each, what in loaded.items():
            self._after_load(order, each, what)
        return loaded

    def _order_later(self, order: Order, absent: Sequence[WorkerModels]) -> None:
        """The parts for workers that are down."""
        for each in absent:
            self.order(Order(order.name, order.source, each.name, is_patient=True))

    async def _leave_others(
        self, order: Order, failures: Mapping[WorkerModels, ThirdrailError], placed: Placed
    ) -> None:
        """What served before serves nowhere beside what was just loaded: callers of one model shall
        not meet two."""
        for each, error in failures.items():
            _log.warning("'%s' is served without worker '%s': %s", order.name, each.name, error)
            await each.unload(order.name)
            self._catalog.end_unload(order.name, error.message, each.name)
        self._orders.end_parts(order.name, order.source, LOADED_MEANWHILE)
        belongs = {each for each, _count in placed}
        for each in self.workers:
            if each not in belongs:
                await each.unload(order.name)
                self._catalog.leave(order.name, each.name)

    def _after_load(self, order: Order, where: WorkerModels, loaded: LoadedModel) -> None:
        name, engines = order.name, loaded.engines
        self.engines.loaded(name, engines)
        for version, engine in engines.items():
            if engine.reason:
                level = logging.INFO if engine.is_stopgap else logging.WARNING
                facts = (name, version, engine.name, engine.reason)
                _log.log(level, "model '%s' version %d is run by %s, not by %s", *facts)
            elif order.improves:
                told = (name, version, engine.name)
                _log.info("model '%s' version %d is run by %s from now on", *told)
        if any(engine.is_stopgap for engine in engines.values()):
            # Now: who loads it next must know.
            self.order(Order(name, order.source, where.name, is_patient=True, improves=True))

    async def _improve(self, order: Order) -> list[int]:
        """Load again, now waiting for the engine that has to be built, while another one serves.

        Another load, or an unload, comes first and puts an end to this.
        """
        try:
            return await self._load(order)
        except WorkerDied as death:
            verdict = self._workers[order.worker].verdict(order.name)
            reason = f"worker died while loading a better engine: {death.how}"
            settles_for = reason if verdict is Verdict.BROKEN else ""
            again = Order(order.name, order.source, order.worker, True, settles_for=settles_for)
            self.order(again)
            return []

    async def _prepare(self, order: Order) -> tuple[PreparedLoad, Placed]:
        name, order.has_read = order.name, True
        try:
            prepared = await asyncio.to_thread(prepare, name, order.source)
            devices = devices_of(prepared.command.config, self._gpus)
            placed = [(self._workers[each.worker], count) for each, count in devices.items()]
            if order.worker:
                placed = [found for found in placed if found[0].name == order.worker]
            if not placed:
                raise RepositoryError("instance_group places it on other devices; load it again")
        except ModelMissing as error:
            # A name that nobody knows leaves no trace, or callers could fill the catalog.
            if self._catalog.get(name) is not None:
                self._catalog.fail_load(name, error.message, order.worker)
            raise NotFound(error.message) from None
        except RepositoryError as error:
            self._catalog.fail_load(name, error.message, order.worker)
            raise Internal(
                f"failed to load '{name}', failed to poll from model repository: {error}"
            ) from None
        if not order.worker:
            self._catalog.place(name, [each.name for each, _count in placed])
        return prepared, placed

    # What the workers ask for: see worker_models.Desk

    def comes_back(self, worker: str, name: str, source: LoadSource) -> None:
        # It must serve again before it is improved.
        self._orders.end_improvements(name, "its worker died", worker)
        self.order(Order(name, source, worker, is_patient=True))

    async def let_go(self, name: str, source: LoadSource | None) -> None:
        """Uploaded files are kept as long as a worker needs them."""
        if source is None or self._orders.need(name, source.repository):
            return
        if not any(each.uses(name, source.repository) for each in self.workers):
            await asyncio.to_thread(self._uploads.discard, source.repository)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or isinstance(task.exception(), ThirdrailError | None):
            return
        _log.error("model control failed", exc_info=task.exception())


def _log_reservations(order: Order, loaded: Iterable[LoadedModel]) -> None:
    """What is not as the configuration has it, once for all the model's parts."""
    if not order.improves:  # else the load before has told it
        for text in dict.fromkeys(text for each in loaded for text in each.reservations):
            _log.warning("model '%s': %s", order.name, text)
