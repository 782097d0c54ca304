# SPDX-License-Identifier: Apache-2.0
"""The models of one worker: who is found by a name, and how that changes.

A load prepares every version first and then swaps all of them in at once, between two requests:
whoever was found before finishes on the old ones, whoever comes after meets the new ones.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from thirdrail.errors import Cancelled, InvalidArgument, NotFound, ThirdrailError, Unavailable
from thirdrail.v1 import metrics_pb2
from thirdrail_engines.engine import DeviceLost, ModelFileError
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import (
    LoadCommand,
    LoadedModel,
    LoadProgress,
    Resident,
    WorkerMemory,
)
from thirdrail_server.worker.loaders import Loaders
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.memory import ModelTooLarge
from thirdrail_server.worker.reports import version_engine
from thirdrail_server.worker.served_version import OnDeviceLost, ServedVersion

log = logging.getLogger(__name__)

CANCELLED = "the load was cancelled"
STOPPING = "the server is stopping"
CLOSING_S_MAX = 2.0
STEPS_PER_VERSION = 3  # building, proving, warming up

TellProgress = Callable[[LoadProgress], None]


@dataclass(slots=True)
class _Model:
    versions: dict[int, ServedVersion] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that its engines hold."""
        return sum(each.weight.size for each in self.versions.values())


class ModelTable:
    """All models that this worker serves. Lives on the worker's loop."""

    def __init__(
        self, config: WorkerConfig, on_device_lost: OnDeviceLost = lambda error: None
    ) -> None:
        """on_device_lost: called on the loop, maybe more than once."""
        self._config = config
        self._on_device_lost = on_device_lost
        self._models: dict[str, _Model] = {}
        self._loaders = Loaders(config)
        self._retiring: set[asyncio.Task[None]] = set()
        self._leaving_bytes = 0  # of engines that are out of the table and not yet closed
        self._loading: dict[str, set[threading.Event]] = {}  # by model; set: the load is to end
        self._is_stopping = False

    def find(self, name: str, version: int) -> ServedVersion:
        """The version that takes a request now; 0 is the newest.

        Raises NotFound, InvalidArgument for a negative version.
        """
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version == 0:
            return model.versions[max(model.versions)]
        served = model.versions.get(version)
        if served is not None:
            return served
        if version < 0:
            raise InvalidArgument(f"a model version is a number above 0, got {version}")
        raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")

    async def load(self, command: LoadCommand, progress: TellProgress) -> LoadedModel:
        """Load these versions in place of what the model has.

        In a model that serves already, one failure leaves everything as it was; in one that does
        not, the versions that load are served and the others' reasons told.
        Raises ModelFileError or RepositoryError, of the newest failing version, when nothing
        changed; Cancelled.
        """
        if self._is_stopping:
            raise Cancelled(STOPPING)
        cancelled = threading.Event()
        self._loading.setdefault(command.name, set()).add(cancelled)
        try:
            return await self._load(command, progress, cancelled)
        finally:
            self._loading[command.name].discard(cancelled)
            if not self._loading[command.name]:
                del self._loading[command.name]

    def cancel_loads(self, name: str | None) -> None:
        """End the builds of a model that is being loaded, and with them its loads. None: of all
        models, and no load begins any more."""
        self._is_stopping |= name is None
        for key, loads in self._loading.items():
            if name in (None, key):
                for cancelled in loads:
                    cancelled.set()

    async def _load(
        self, command: LoadCommand, progress: TellProgress, cancelled: threading.Event
    ) -> LoadedModel:
        name = command.name
        prepared: list[PreparedVersion] = []
        failures: dict[int, Exception] = {}
        steps = len(command.versions) * STEPS_PER_VERSION
        try:
            for number, (version, path) in enumerate(command.versions):
                tell = _Phases(progress, number * STEPS_PER_VERSION, steps)
                try:
                    prepared.append(
                        await self._loaders.prepare(command, version, path, tell, cancelled)
                    )
                except (ModelFileError, ThirdrailError) as error:
                    failures[version] = error
                except DeviceLost as error:
                    self._on_device_lost(error)
                    raise Unavailable(str(error)) from None
                if cancelled.is_set():
                    raise Cancelled(STOPPING if self._is_stopping else CANCELLED)
            if failures and (name in self._models or not prepared):
                raise failures[max(failures)]
            self._require_room(prepared, command.memory_bytes_max)
            self._swap(name, prepared)
        except BaseException:
            for each in prepared:
                each.engine.close()
            raise
        progress(LoadProgress("ready", steps, steps))
        newest = max(prepared, key=lambda each: each.spec.version)
        texts = {version: str(error) for version, error in failures.items()}
        return LoadedModel(
            config=newest.config,
            versions={each.spec.version: None for each in prepared} | texts,
            in_place={each.spec.version: sorted(_in_place(each)) for each in prepared},
            warnings=list(dict.fromkeys(note for each in prepared for note in each.notes)),
            engines={
                each.spec.version: version_engine(each.report, is_stopgap=each.is_stopgap)
                for each in prepared
            },
        )

    def _require_room(self, prepared: Sequence[PreparedVersion], bytes_max: int) -> None:
        """Beside all that is here, with no await between this and the swap: whatever the front knew
        when it decided, the budget holds. Raises ModelTooLarge. 0: there is no budget.
        """
        size = sum(each.weight.size for each in prepared)
        if bytes_max and self.memory().total + size > bytes_max:
            raise ModelTooLarge(size)

    def _swap(self, name: str, prepared: Sequence[PreparedVersion]) -> None:
        new = _Model()
        for each in prepared:
            new.versions[each.spec.version] = ServedVersion(
                each.spec,
                each.engine,
                each.options.queue,
                instances=each.options.instances,
                place=each.place,
                weight=each.weight,
                on_device_lost=self._on_device_lost,
            )
        old = self._models.get(name)
        self._models[name] = new
        for version, served in new.versions.items():
            if old is not None and version in old.versions:
                served.statistics.continue_from(old.versions[version].statistics)
        if old is not None:
            retiring = asyncio.create_task(self._retire(old, f"model '{name}' was replaced"))
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)

    async def unload(self, name: str) -> None:
        """Take the model out of the table, let its requests finish, give its memory back.

        Raises NotFound for a model that is not there.
        """
        model = self._models.pop(name, None)
        if model is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        await self._retire(model, f"model '{name}' was unloaded")

    async def evict(self, name: str) -> bool:
        """`unload` a model, unless a request waits or runs. Raises NotFound."""
        model = self._models.get(name)
        if model is not None and not all(each.is_idle for each in model.versions.values()):
            return False
        await self.unload(name)
        return True

    async def _retire(self, model: _Model, reason: str) -> None:
        for version in model.versions.values():
            self._leaving_bytes += version.weight.size
            version.closed.add_done_callback(partial(self._forget, version.weight.size))
        await asyncio.gather(
            *(v.retire(reason, self._config.drain_s_max) for v in model.versions.values())
        )

    def _forget(self, size: int, _closed: object) -> None:
        """A run that is still under way when the drain's time is up holds its engine's memory."""
        self._leaving_bytes -= size

    def memory(self) -> WorkerMemory:
        """What the engines hold."""
        residents = [
            Resident(
                name,
                model.size,
                max(each.used_ms for each in model.versions.values()),
                not all(each.is_idle for each in model.versions.values()),
            )
            for name, model in sorted(self._models.items())
        ]
        return WorkerMemory(residents, self._leaving_bytes, self._loaders.shared_bytes())

    async def close(self) -> None:
        """End the builds that are under way, and whatever they have started."""
        self.cancel_loads(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_S_MAX):
                while self._loading:
                    await asyncio.sleep(CLOSING_S_MAX / 100)
        self._loaders.close()

    def counters(self) -> list[metrics_pb2.ModelCounters]:
        return [
            served.counters()
            for _, model in sorted(self._models.items())
            for _, served in sorted(model.versions.items())
        ]


# What the worker does itself, and how far a version is then.
_PHASES = {
    "building": 0,
    "loading the engine": 1,
    "proving the engine": 1,
    "proving": 1,
    "warming up": 2,
}


@dataclass(frozen=True, slots=True)
class _Phases:
    """Turns the phases of one version into steps of the whole load."""

    progress: TellProgress
    first: int
    steps: int

    def __call__(self, phase: str, step: int, steps: int) -> None:
        """step, steps: within the phase. Those that are not known here are phases of a build."""
        order = _PHASES.get(phase, 0)
        whole = self.first + order, self.steps
        is_building = phase not in _PHASES
        self.progress(LoadProgress(phase, *whole, step, steps, is_building))


def _in_place(prepared: PreparedVersion) -> frozenset[str]:
    return prepared.spec.positional_inputs & prepared.spec.inputs.keys()
