# SPDX-License-Identifier: Apache-2.0
"""Loads and unloads models: at the start, on demand, when files change, after a worker's death.

Each model has its turn: one load or unload at a time. A load that somebody asked for goes on when
the asker hangs up, so that the catalog never depends on a client's patience. The worker swaps a
model in one step, so a failed reload changes nothing but the catalog's warnings. One broken model
is that model's own affair.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from thirdrail.errors import (
    Cancelled,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.v1 import metrics_pb2
from thirdrail_server.config import ModelControlMode, ServerConfig
from thirdrail_server.control_messages import LoadedModel, LoadProgress, message_of_text
from thirdrail_server.front.announcements import shortened
from thirdrail_server.front.control.access import refuse_unless_explicit
from thirdrail_server.front.control.catalog import EVICTED, Catalog
from thirdrail_server.front.control.counters import CounterBook
from thirdrail_server.front.control.engine_book import EngineBook
from thirdrail_server.front.control.load_source import (
    LoadSource,
    ModelMissing,
    PreparedLoad,
    prepare,
)
from thirdrail_server.front.control.placement import Need, mib
from thirdrail_server.front.control.restarts import LoadLedger, Verdict
from thirdrail_server.front.control.room import RoomMaker
from thirdrail_server.front.control.supervisor import Supervisor, WorkerDied, WorkerNews
from thirdrail_server.front.control.turns import LoadGate, Turns
from thirdrail_server.front.control.uploads import Uploads
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fingerprint import Fingerprint, snapshot
from thirdrail_server.repository.layout import ModelFolder, scan
from thirdrail_server.repository.poll import Decision, Poller

TellProgress = Callable[[LoadProgress], None]


def _to_nobody(_progress: LoadProgress) -> None:
    """A TellProgress for loads that nobody waits for."""


T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Order:
    """A load to be done. is_patient: it waits for a worker that is not there.

    improves: the model serves, from the same source, and gets the engine that had to be built.
    settles_for: why the engine that can serve at once has to do, for good.
    """

    name: str
    source: LoadSource
    is_patient: bool = False
    improves: bool = False
    settles_for: str = ""

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


class _TooLarge(Exception):
    """The worker has loaded it, and dropped it again, for it takes more than it may."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size  # bytes


class ModelControl:
    """The only writer of the catalog. `await start()`, load and unload, `await stop()`."""

    def __init__(self, config: ServerConfig, catalog: Catalog, worker: Supervisor) -> None:
        self._config = config
        self._catalog = catalog
        self._worker = worker
        self._turns = Turns(config.control.waiting_per_model_max)
        worker_loads_max = config.worker.loads_at_once_max
        compiling_loads_max = config.worker.compiling.loads_at_once_max
        self._gate = LoadGate(worker_loads_max + compiling_loads_max)
        # Of their own: they wait for builds, for which nobody else shall wait.
        self._improvements = LoadGate(compiling_loads_max)
        self._ledger: LoadLedger[LoadSource] = LoadLedger()
        self._uploads = Uploads(config.control.upload_files_max, config.upload_bytes_max)
        self._counters = CounterBook()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._room = RoomMaker(
            config.memory,
            worker,
            is_held=self._turns.is_taken,
            evict=self._evict,
            unload=self._unload_to_reload,
        )
        self.evictions = 0
        self._improving: dict[str, LoadSource] = {}  # these serve while a better engine is built
        self.engines = EngineBook()
        catalog.expect_worker(worker.name)

    @property
    def memory_bytes_max(self) -> int:
        """The memory budget of the worker; 0: there is none."""
        return self._config.memory.bytes_max

    @property
    def news(self) -> WorkerNews:
        """What the supervisor is started with."""
        return WorkerNews(self._on_worker_started, self._on_worker_died)

    async def start(self) -> None:
        """Read the repository and begin to load; the catalog tells how that goes.

        Raises RepositoryError when there is no readable repository, ResourceExhausted when it has
        too many models, InvalidArgument when a model of `load_models` is not in it.
        """
        folders, prints = await asyncio.to_thread(self._look)
        names = self._startup_names(folders)
        self._catalog.expect(names)
        for name in folders.keys() - set(names):
            self._catalog.list_unloaded(name, folders[name].versions)
        for name in names:
            self._load_later(name, LoadSource(self._config.repository))
        if self._config.model_control is ModelControlMode.POLL:
            self._spawn(self._follow_repository(Poller(prints)))

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
        InvalidArgument and ResourceExhausted (files, a full line), Internal: the load failed. What
        served before goes on serving.
        """
        refuse_unless_explicit(self._config.model_control)
        source = LoadSource(self._config.repository, config)
        if files:
            if config is None:
                raise InvalidArgument(f"uploaded files for '{name}' need a configuration with them")
            repository = await asyncio.to_thread(self._uploads.store, name, files)
            source = LoadSource(repository, config)
        await self._stop_improving(name)
        load = self._spawn(self._load(_Order(name, source), progress))
        return await asyncio.shield(load)

    async def unload(self, name: str, *, wait: bool = True) -> None:
        """Unload a model on demand; one that is not loaded stays so.

        wait: until its last request has ended and its memory is free; else only until nobody gets
        it any more. Raises ControlIsOff, NotFound, ResourceExhausted.
        """
        refuse_unless_explicit(self._config.model_control)
        if self._catalog.get(name) is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        await self._cancel_loads(name)
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
        await self._cancel_loads(None)

    async def counters(self) -> list[metrics_pb2.ModelCounters]:
        """Of every model version since the server started; they never decrease."""
        try:
            async with asyncio.timeout(self._config.control.worker_answer_s_max):
                answer = await self._worker.call("counters")
            texts = answer["models"]
            self._counters.observe(
                [message_of_text(metrics_pb2.ModelCounters, text) for text in texts]
            )
        except (ThirdrailError, TimeoutError):
            pass  # no worker to ask: what was known stays true
        except (KeyError, TypeError, ValueError) as error:
            _log.error(
                "worker '%s' sent counters that cannot be read: %r", self._worker.name, error
            )
        return self._counters.totals()

    # The worker's life

    def _on_worker_started(self) -> None:
        self._catalog.worker_started(self._worker.name)

    def _on_worker_died(self, how: str) -> None:
        aftermath = self._ledger.on_death()
        self._counters.restart()
        names = [name for name, _source in aftermath.lost]
        self._catalog.worker_died(self._worker.name, (*names, *aftermath.retried))
        if names:
            _log.warning("not served until there is a worker again: %s", shortened(names))
        for name, source in aftermath.lost:
            self._improving.pop(name, None)  # it must serve again before it is improved
            self._load_later(name, source)

    # Loading

    async def _load(self, order: _Order, progress: TellProgress = _to_nobody) -> list[int]:
        """Load in the model's turn."""
        name = order.name
        before: LoadSource | None = order.source  # not needed any more, whichever way this ends
        try:
            async with self._turns.of(name):
                loaded, before = await self._load_in_turn(order, progress)
        except ThirdrailError as error:
            _log.warning("%s", error)
            raise
        finally:
            if before is not None and not order.improves:  # else it served before, and still does
                self._uploads.discard(before.repository)
        versions = [version for version, failure in loaded.versions.items() if failure is None]
        _log.info("model '%s' serves, version %s", name, ", ".join(map(str, versions)))
        if any(engine.is_stopgap for engine in loaded.engines.values()):
            self._improving[name] = order.source  # now: who loads it next must know
            self._spawn(self._improve(name, order.source))
        return versions

    async def _improve(self, name: str, source: LoadSource) -> None:
        """Load again, now waiting for the engine that has to be built, while another one serves.

        Another load, or an unload, comes first and puts an end to this.
        """
        try:
            await self._load(_Order(name, source, is_patient=True, improves=True))
        except WorkerDied as death:
            is_culprit = self._ledger.verdict(name) is Verdict.BROKEN
            reason = f"worker died while loading a better engine: {death.how}"
            again = _Order(name, source, is_patient=True, settles_for=reason if is_culprit else "")
            self._spawn(self._load(again))
        finally:
            if self._improving.get(name) is source:
                del self._improving[name]

    async def _load_in_turn(
        self, order: _Order, progress: TellProgress
    ) -> tuple[LoadedModel, LoadSource | None]:
        """Returns what serves now, and the source that it serves from no longer."""
        is_patient, is_alone, name = order.is_patient, False, order.name
        while True:
            if is_patient:
                await self._worker.wait_until_up()
            gate = self._improvements if order.improves else self._gate
            async with gate.alone() if is_alone else gate.shared():
                if is_patient and not self._worker.is_up:
                    continue
                try:
                    return await self._load_once(order, progress)
                except WorkerDied as death:
                    if order.improves:
                        raise
                    verdict = self._ledger.verdict(name)
                    if verdict is Verdict.BROKEN:
                        reason = f"worker died while loading it: {death.how}"
                        self._catalog.fail_load(name, reason)
                        raise Internal(f"failed to load '{name}', {reason}") from None
                    is_patient, is_alone = True, verdict is Verdict.RETRY_ALONE
                except Unavailable:
                    if not is_patient:
                        raise

    async def _load_once(
        self, order: _Order, progress: TellProgress
    ) -> tuple[LoadedModel, LoadSource | None]:
        name, source = order.name, order.source
        progress(LoadProgress("reading"))
        prepared = await self._prepare(order)
        self._refuse_unwanted(order)
        if not self._worker.is_up:
            raise Unavailable(
                f"failed to load '{name}': worker '{self._worker.name}' is being restarted"
            )
        self._catalog.begin_load(name, dict(prepared.command.versions), self._worker.name)
        self._ledger.begin(name)
        try:
            loaded = order.settled(await self._load_with_room(order, prepared, progress))
        except WorkerDied:
            raise
        except Cancelled as error:
            self._ledger.fail(name)
            self._catalog.cancel_load(name)
            raise Cancelled(f"loading '{name}' ended early: {error}") from None
        except ThirdrailError as error:
            self._ledger.fail(name)
            self._catalog.fail_load(name, error.message)
            kind = ResourceExhausted if isinstance(error, ResourceExhausted) else Internal
            raise kind(f"failed to load '{name}', no version is available: {error}") from None
        except BaseException:
            self._ledger.fail(name)
            raise
        before = self._ledger.succeed(name, source)
        self._catalog.end_load(name, loaded, self._worker.name)
        self.engines.loaded(name, loaded.engines)
        for version, engine in loaded.engines.items():
            if engine.reason:
                level = logging.INFO if engine.is_stopgap else logging.WARNING
                facts = (name, version, engine.name, engine.reason)
                _log.log(level, "model '%s' version %d is run by %s, not by %s", *facts)
        return loaded, before

    def _refuse_unwanted(self, order: _Order) -> None:
        if order.improves and self._improving.get(order.name) is not order.source:
            raise Cancelled(f"a better engine for '{order.name}' is not wanted any more")

    async def _prepare(self, order: _Order) -> PreparedLoad:
        name = order.name
        try:
            prepared = await asyncio.to_thread(prepare, name, order.source)
            command = replace(
                prepared.command,
                takes_stopgap=not order.improves,
                memory_bytes_max=self.memory_bytes_max,
            )
            return replace(prepared, command=command)
        except ModelMissing as error:
            # A name that nobody knows leaves no trace, or callers could fill the catalog.
            if self._catalog.get(name) is not None:
                self._catalog.fail_load(name, error.message)
            raise NotFound(error.message) from None
        except RepositoryError as error:
            self._catalog.fail_load(name, error.message)
            raise Internal(
                f"failed to load '{name}', failed to poll from model repository: {error}"
            ) from None

    async def _load_with_room(
        self, order: _Order, prepared: PreparedLoad, progress: TellProgress
    ) -> LoadedModel:
        """Once more where it turns out larger than its files are, with the figure that is known
        then. A build never interrupts what serves until it is done."""
        name, may_interrupt = prepared.command.name, prepared.command.takes_stopgap
        need = Need(name, prepared.files_bytes)
        while True:
            async with self._room.made(need, may_interrupt=may_interrupt):
                self._refuse_unwanted(order)  # the worker cancels nothing that it does not know
                try:
                    return await self._load_in_worker(prepared, progress)
                except _TooLarge as error:
                    if need.is_measured:
                        text = f"it takes {mib(error.size)}, which others took meanwhile"
                        raise ResourceExhausted(text) from None
                    need = Need(name, error.size, is_measured=True)

    async def _load_in_worker(self, prepared: PreparedLoad, progress: TellProgress) -> LoadedModel:
        def tell(fields: dict[str, Any]) -> None:
            told = LoadProgress.from_fields(fields)
            self._catalog.tell_phase(prepared.command.name, told.phase)
            self._ledger.note(prepared.command.name, is_building=told.is_building)
            progress(told)

        answer = await self._worker.call("load", prepared.command.to_fields(), tell)
        if "too_large_bytes" in answer:
            raise _TooLarge(int(answer["too_large_bytes"]))
        loaded = LoadedModel.from_fields(answer)
        versions: dict[int, str | None] = {**loaded.versions, **prepared.failures}
        if None not in versions.values():
            raise Internal(
                "; ".join(f"version {v}: {text}" for v, text in sorted(versions.items()))
            )
        return replace(loaded, versions=dict(sorted(versions.items())))

    def _load_later(self, name: str, source: LoadSource) -> None:
        self._spawn(self._load(_Order(name, source, is_patient=True)))

    async def _cancel_loads(self, name: str | None) -> None:
        """None: of all models, for good."""
        if name is not None:
            self._improving.pop(name, None)
        with contextlib.suppress(ThirdrailError, TimeoutError):  # no worker: nothing is built
            async with asyncio.timeout(self._config.control.worker_answer_s_max):
                await self._worker.call("cancel loads", {} if name is None else {"name": name})

    async def _stop_improving(self, name: str) -> None:
        """For a load that is to take its place."""
        if self._improving.pop(name, None) is not None:
            await self._cancel_loads(name)

    # Unloading

    async def _unload(self, name: str, is_leaving: asyncio.Event) -> None:
        async with self._turns.of(name):
            model = self._catalog.get(name)
            if model is None:
                return
            source = self._ledger.forget(name)
            self._catalog.begin_unload(name)
            is_leaving.set()
            failure: ThirdrailError | None = None
            if source is not None:
                failure = await self._unload_in_worker(name)
                await asyncio.to_thread(self._uploads.discard, source.repository)
            self._catalog.end_unload(name)
            if failure is not None:
                raise failure
        _log.info("model '%s' is unloaded", name)

    async def _unload_in_worker(self, name: str) -> ThirdrailError | None:
        try:
            await self._worker.call("unload", {"name": name})
        except (Unavailable, NotFound):
            pass  # the worker, or the model in it, is gone: that is what was asked for
        except ThirdrailError as error:
            _log.error("model '%s' was not unloaded cleanly: %s", name, error)
            return error
        return None

    async def _unload_to_reload(self, name: str) -> None:
        """In the model's turn: there is no room for what serves and what is loaded beside it."""
        self._catalog.interrupt(name)
        source = self._ledger.forget(name)
        await self._unload_in_worker(name)
        if source is not None:
            await asyncio.to_thread(self._uploads.discard, source.repository)

    async def _evict(self, name: str, needy: str) -> bool:
        """Take an idle model out of memory for another one. False: it is not idle any more."""
        if self._turns.is_taken(name):
            return False
        async with self._turns.of(name):
            answer = await self._worker.call("evict", {"name": name})
            if not answer.get("evicted"):
                return False
            source = self._ledger.forget(name)
            self._catalog.end_unload(name, f"{EVICTED} '{needy}'; load it to use it again")
            if source is not None:
                await asyncio.to_thread(self._uploads.discard, source.repository)
        self.evictions += 1
        _log.warning("model '%s' was %s '%s'", name, EVICTED, needy)
        return True

    # The repository

    def _look(self) -> tuple[dict[str, ModelFolder], dict[str, Fingerprint]]:
        folders = scan(self._config.repository)
        return folders, snapshot(folders)

    def _startup_names(self, folders: Mapping[str, ModelFolder]) -> list[str]:
        wanted = self._config.load_models
        if self._config.model_control is not ModelControlMode.EXPLICIT or "*" in wanted:
            return list(folders)
        for name in wanted:
            if name not in folders:
                raise InvalidArgument(f"the repository has no model '{name}' to load at the start")
        return list(dict.fromkeys(wanted))

    async def _follow_repository(self, poller: Poller) -> None:
        while True:
            await asyncio.sleep(self._config.poll_interval_s)
            try:
                _folders, prints = await asyncio.to_thread(self._look)
            except RepositoryError as error:
                _log.error("polling goes on with the models as they are: %s", error)
                continue
            for decision in poller.observe(prints):
                self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        if decision.action == "unload":
            self._spawn(self._unload_and_remove(decision.name))
        else:
            self._spawn(self._reload(decision.name))

    async def _reload(self, name: str) -> None:
        await self._stop_improving(name)
        await self._load(_Order(name, LoadSource(self._config.repository), is_patient=True))

    async def _unload_and_remove(self, name: str) -> None:
        await self._cancel_loads(name)
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
