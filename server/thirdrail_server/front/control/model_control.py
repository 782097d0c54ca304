# SPDX-License-Identifier: Apache-2.0
"""Loads and unloads models: at the start, on demand, when files change, after a worker's death.

Each model has its turn: one load or unload at a time, in all the workers that it runs on. A load
that somebody asked for goes on when the asker hangs up, so that the catalog never depends on a
client's patience. One broken model is that model's own affair, and one broken worker is the affair
of what runs there. How a load is done is in model_loads.py.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from thirdrail.errors import InvalidArgument, NotFound
from thirdrail.v1 import metrics_pb2
from thirdrail_server.config import ModelControlMode, ServerConfig
from thirdrail_server.front.control.access import refuse_unless_explicit
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.counters import summed
from thirdrail_server.front.control.engine_book import EngineBook
from thirdrail_server.front.control.load_source import LoadSource
from thirdrail_server.front.control.model_loads import ModelLoads
from thirdrail_server.front.control.orders import Order
from thirdrail_server.front.control.repository_watch import Look, look, startup_names
from thirdrail_server.front.control.supervisor import Supervisor
from thirdrail_server.front.control.uploads import Uploads, remove_abandoned
from thirdrail_server.front.control.worker_load import TellProgress
from thirdrail_server.front.control.worker_models import WorkerModels
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.device_choice import Device
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.poll import Decision, Poller

_log = logging.getLogger(__name__)


class ModelControl:
    """The only writer of the catalog. `await start()`, load and unload, `await stop()`.

    workers: by device; the GPUs in the order of their numbers.
    """

    def __init__(
        self, config: ServerConfig, catalog: Catalog, workers: Mapping[Device, Supervisor]
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._uploads = Uploads(config.control.upload_files_max, config.upload_bytes_max)
        self._loads = ModelLoads(config, catalog, workers, self._uploads)

    @property
    def workers(self) -> Sequence[WorkerModels]:
        return self._loads.workers

    @property
    def engines(self) -> EngineBook:
        return self._loads.engines

    async def start(self) -> None:
        """Read the repository and begin to load; the catalog tells how that goes.

        Raises RepositoryError when there is no readable repository, or a model of `load_models` is
        not in it, ResourceExhausted when it has too many models.
        """
        self._loads.spawn(asyncio.to_thread(remove_abandoned))
        found = await asyncio.to_thread(look, self._config.repository)
        names = startup_names(self._config, found.folders)
        self._catalog.expect(names)
        for name in found.folders.keys() - set(names):
            self._catalog.list_not_loaded(name, found.folders[name].versions)
        for name in names:
            self._loads.order(self._from_repository(name))
        if self._config.model_control is ModelControlMode.POLL:
            self._loads.spawn(self._follow_repository(found))

    async def stop(self) -> None:
        """Give up all loads, remove uploaded files. Nothing is unloaded: the worker ends next."""
        await self._loads.stop()
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
        if files and config is None:
            raise InvalidArgument(f"uploaded files for '{name}' need a configuration with them")
        ordering = self._order(name, config, files, progress)
        # What is written for a caller who hangs up would else be nobody's.
        load = await (asyncio.shield(self._loads.spawn(ordering)) if files else ordering)
        return await asyncio.shield(load)

    async def unload(self, name: str, *, wait: bool = True) -> None:
        """Unload a model on demand; one that is not loaded stays so. Loads of it that were asked
        for before end.

        wait: until its last request has ended and its memory is free; else only until nobody gets
        it any more. Raises ControlIsOff, NotFound, ResourceExhausted.
        """
        refuse_unless_explicit(self._config.model_control)
        if self._catalog.get(name) is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        await self._loads.end(name)
        is_leaving = asyncio.Event()
        unload = self._loads.spawn(self._unload(name, is_leaving))
        left = self._loads.spawn(is_leaving.wait())
        waits_for = {unload} if wait else {unload, left}
        try:
            await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
        if unload.done():
            unload.result()

    async def cancel_loads(self) -> None:
        """Begin to stop: builds end now, and the loads that wait, for them or for a worker."""
        await self._loads.end_all()

    async def counters(self) -> list[metrics_pb2.ModelCounters]:
        """Of every model version since the server started; they never decrease."""
        return summed(await asyncio.gather(*(each.counters() for each in self.workers)))

    async def _order(
        self,
        name: str,
        config: ModelConfig | None,
        files: Mapping[str, bytes] | None,
        progress: TellProgress,
    ) -> asyncio.Task[list[int]]:
        """Returns the load, which has its files from now on."""
        repository = self._config.repository
        if files:
            repository = await asyncio.to_thread(self._uploads.store, name, files)
        await self._loads.end_improvements(name)
        return self._loads.order(Order(name, LoadSource(repository, config)), progress)

    # Unloading

    async def _unload(self, name: str, is_leaving: asyncio.Event) -> None:
        async with self._loads.turns.of(name):
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
        problem = ""
        while True:
            await asyncio.sleep(self._config.poll_interval_s)
            try:
                found = await asyncio.to_thread(look, self._config.repository)
            except RepositoryError as error:
                if str(error) != problem:  # told once, however long it lasts
                    problem = str(error)
                    _log.error("polling goes on with the models as they are: %s", problem)
                continue
            if problem:
                _log.info("the model repository can be read again")
                problem = ""
            for decision in poller.observe(found.prints):
                self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        if decision.action == "unload":
            self._loads.spawn(self._unload_and_remove(decision.name))
        else:
            self._loads.spawn(self._reload(decision.name))

    async def _reload(self, name: str) -> None:
        order = self._from_repository(name)
        if self._loads.will_read(name, order.source):
            return  # files that change all the time would else fill the line behind a long load
        await self._loads.end_improvements(name)
        await asyncio.shield(self._loads.order(order))

    async def _unload_and_remove(self, name: str) -> None:
        await self._loads.end(name)
        await self._unload(name, asyncio.Event())
        self._catalog.remove(name)

    def _from_repository(self, name: str) -> Order:
        return Order(name, LoadSource(self._config.repository), is_patient=True)
