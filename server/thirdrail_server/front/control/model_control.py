# SPDX-License-Identifier: Apache-2.0
"""Loads and unloads models: at the start, on demand, when files change, after a worker's death.

Each model has its turn: one load or unload at a time, in all the workers that it runs on. A load
that somebody asked for goes on when the asker hangs up, so that the catalog never depends on a
client's patience. One broken model is that model's own affair, and one broken worker is the affair
of what runs there. What a worker does is in worker_models.py.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from thirdrail.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    ThirdrailError,
    Unavailable,
)
from thirdrail.v1 import metrics_pb2
from thirdrail_server.config import ModelControlMode, ServerConfig
from thirdrail_server.control_messages import LoadedModel, LoadProgress
from thirdrail_server.front.control.access import refuse_unless_explicit
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.counters import summed
from thirdrail_server.front.control.engine_book import EngineBook
from thirdrail_server.front.control.load_source import (
    LoadSource,
    ModelMissing,
    PreparedLoad,
    prepare,
)
from thirdrail_server.front.control.orders import Order, Orders
from thirdrail_server.front.control.repository_watch import Look, look, startup_names
from thirdrail_server.front.control.restarts import Verdict
from thirdrail_server.front.control.supervisor import Supervisor, WorkerDied
from thirdrail_server.front.control.turns import Turns
from thirdrail_server.front.control.uploads import Uploads
from thirdrail_server.front.control.worker_models import TellProgress, WorkerModels
from thirdrail_server.front.devices import memory_budget, worker_config
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.device_choice import Device, devices_of
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.poll import Decision, Poller

T = TypeVar("T")
Placed = list[tuple[WorkerModels, int]]  # where a model belongs, with how many instances

UNLOADED_MEANWHILE = "the model was unloaded meanwhile"
LOADED_MEANWHILE = "the model was loaded again meanwhile"
STOPPING = "the server is stopping"

_log = logging.getLogger(__name__)


def _to_nobody(_progress: LoadProgress) -> None:
    """A TellProgress for loads that nobody waits for."""


class ModelControl:
    """The only writer of the catalog. `await start()`, load and unload, `await stop()`.

    workers: by device; the GPUs in the order of their numbers.
    """

    def __init__(
        self, config: ServerConfig, catalog: Catalog, workers: Mapping[Device, Supervisor]
    ) -> None:
        self._config = config
        self._catalog = catalog
        self.turns = Turns(config.control.waiting_per_model_max)
        self._orders = Orders()
        self._uploads = Uploads(config.control.upload_files_max, config.upload_bytes_max)
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

    async def start(self) -> None:
        """Read the repository and begin to load; the catalog tells how that goes.

        Raises RepositoryError when there is no readable repository, ResourceExhausted when it has
        too many models, InvalidArgument when a model of `load_models` is not in it.
        """
        found = await asyncio.to_thread(look, self._config.repository)
        names = startup_names(self._config, found.folders)
        self._catalog.expect(names)
        for name in found.folders.keys() - set(names):
            self._catalog.list_unloaded(name, found.folders[name].versions)
        for name in names:
            self._order(self._from_repository(name))
        if self._config.model_control is ModelControlMode.POLL:
            self._spawn(self._follow_repository(found))

    async def stop(self) -> None:
        """Give up all loads, remove uploaded files. Nothing is unloaded: the worker ends next."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._uploads.close)

    async def load(
        self,
        name: str,
        config: ModelConfig | None = None,
        files: Mapping[str, bytes] | None = None,
        progress: TellProgress = lambda _progress: None,
    ) -> list[int]:
        """Load or reload a model on demand. Returns its ready versions.

        config: in place of the repository's config.pbtxt. files: path inside the model's folder ->
        content; the model is then loaded from them alone, and `config` must be given.
        Raises ControlIsOff, NotFound (the repository has no such model), Unavailable (no worker),
        InvalidArgument and ResourceExhausted (files, a full line), Cancelled (it was unloaded),
        Internal: the load failed. What served before goes on serving.
        """
        refuse_unless_explicit(self._config.model_control)
        source = LoadSource(self._config.repository, config)
        if files:
            if config is None:
                raise InvalidArgument(f"uploaded files for '{name}' need a configuration with them")
            repository = await asyncio.to_thread(self._uploads.store, name, files)
            source = LoadSource(repository, config)
        await self._stop_improving(name)
        return await asyncio.shield(self._order(Order(name, source), progress))

    async def unload(self, name: str, *, wait: bool = True) -> None:
        """Unload a model on demand; one that is not loaded stays so. Loads of it that were asked
        for before end.

        wait: until its last request has ended and its memory is free; else only until nobody gets
        it any more. Raises ControlIsOff, NotFound, ResourceExhausted.
        """
        refuse_unless_explicit(self._config.model_control)
        if self._catalog.get(name) is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        await self._end_loads(name)
        is_leaving = asyncio.Event()
        unload = self._spawn(self._unload(name, is_leaving))
        left = self._spawn(is_leaving.wait())
        waits_for = {unload} if wait else {unload, left}
        await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if unload.done():
            unload.result()

    async def cancel_loads(self) -> None:
        """Begin to stop: builds end now, and the loads that wait for them."""
        await self._cancel_in_workers(None)

    async def counters(self) -> list[metrics_pb2.ModelCounters]:
        """Of every model version since the server started; they never decrease."""
        return summed(await asyncio.gather(*(each.counters() for each in self.workers)))

    # What the workers ask for: see worker_models.Desk

    def comes_back(self, worker: str, name: str, source: LoadSource) -> None:
        # It must serve again before it is improved.
        self._orders.end_improvements(name, "its worker died", worker)
        self._order(Order(name, source, worker, is_patient=True))

    async def let_go(self, name: str, source: LoadSource | None) -> None:
        """Uploaded files are kept as long as a worker needs them."""
        if source is None or self._orders.need(name, source.repository):
            return
        if not any(each.uses(name, source.repository) for each in self.workers):
            await asyncio.to_thread(self._uploads.discard, source.repository)

    # Loading

    def _from_repository(self, name: str) -> Order:
        return Order(name, LoadSource(self._config.repository), is_patient=True)

    def _order(self, order: Order, progress: TellProgress = _to_nobody) -> asyncio.Task[list[int]]:
        """Have it done. From now on it can be ended."""
        self._orders.add(order)
        work = self._improve(order) if order.improves else self._load(order, progress)
        task = self._spawn(work)
        task.add_done_callback(lambda _: self._orders.remove(order))
        return task

    async def _load(self, order: Order, progress: TellProgress = _to_nobody) -> list[int]:
        """Load in the model's turn. Returns the versions that serve because of it."""
        name = order.name
        try:
            async with contextlib.AsyncExitStack() as turn:
                with order.waiting():
                    if order.worker:  # not in the turn: nobody shall wait for a worker but this
                        await self._workers[order.worker].wait_until_up()
                    await turn.enter_async_context(self.turns.of(name))
                loaded = await self._load_in_turn(order, progress)
        except ThirdrailError as error:
            _log.warning("%s", error)
            raise
        finally:
            self._orders.remove(order)
            await self.let_go(name, order.source)
        ready = {v for each in loaded.values() for v, fault in each.versions.items() if not fault}
        versions = sorted(ready)
        if versions:
            _log.info("model '%s' serves, version %s", name, ", ".join(map(str, versions)))
        return versions

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
        loading = [self._spawn(each.load(order, prepared, n, progress)) for each, n in here]
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
            self._order(Order(order.name, order.source, each.name, is_patient=True))

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
        if any(engine.is_stopgap for engine in engines.values()):
            # Now: who loads it next must know.
            self._order(Order(name, order.source, where.name, is_patient=True, improves=True))

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
            self._order(again)
            return []

    async def _prepare(self, order: Order) -> tuple[PreparedLoad, Placed]:
        name = order.name
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

    async def _end_loads(self, name: str, why: str = UNLOADED_MEANWHILE) -> None:
        self._orders.end(name, why)
        await self._cancel_in_workers(name)

    async def _cancel_in_workers(self, name: str | None) -> None:
        await asyncio.gather(*(each.cancel_loads(name) for each in self.workers))

    async def _stop_improving(self, name: str) -> None:
        """For a load that is to take its place."""
        if self._orders.end_improvements(name, LOADED_MEANWHILE):
            await self._cancel_in_workers(name)

    # Unloading

    async def _unload(self, name: str, is_leaving: asyncio.Event) -> None:
        async with self.turns.of(name):
            if self._catalog.get(name) is None:
                return
            self._catalog.begin_unload(name)
            is_leaving.set()
            outcomes = await asyncio.gather(*(each.unload(name) for each in self.workers))
            self._catalog.end_unload(name)
            for failure in filter(None, outcomes):
                raise failure
        _log.info("model '%s' is unloaded", name)

    # The repository

    async def _follow_repository(self, found: Look) -> None:
        poller = Poller(found.prints)
        while True:
            await asyncio.sleep(self._config.poll_interval_s)
            try:
                found = await asyncio.to_thread(look, self._config.repository)
            except RepositoryError as error:
                _log.error("polling goes on with the models as they are: %s", error)
                continue
            for decision in poller.observe(found.prints):
                self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        if decision.action == "unload":
            self._spawn(self._unload_and_remove(decision.name))
        else:
            self._spawn(self._reload(decision.name))

    async def _reload(self, name: str) -> None:
        await self._stop_improving(name)
        await asyncio.shield(self._order(self._from_repository(name)))

    async def _unload_and_remove(self, name: str) -> None:
        await self._end_loads(name)
        await self._unload(name, asyncio.Event())
        self._catalog.remove(name)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or isinstance(task.exception(), ThirdrailError | None):
            return
        _log.error("model control failed", exc_info=task.exception())
