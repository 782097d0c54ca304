# SPDX-License-Identifier: Apache-2.0
"""The models of one worker: who is found by a name, and how that changes.

A load prepares every version first and then swaps all of them in at once, between two requests:
whoever was found before finishes on the old ones, whoever comes after meets the new ones.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from thirdrail.errors import InvalidArgument, NotFound, ThirdrailError
from thirdrail.v1 import metrics_pb2
from thirdrail_engines import Inspector
from thirdrail_engines.engine import ModelFileError
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import LoadedModel, LoadProgress, VersionEngine
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.worker.loading import PreparedVersion, prepare_version
from thirdrail_server.worker.served_version import ServedVersion

log = logging.getLogger(__name__)

ENGINE_NAME = "onnxruntime"
STEPS_PER_VERSION = 3  # building, proving, warming up

TellProgress = Callable[[LoadProgress], None]


@dataclass(slots=True)
class _Model:
    versions: dict[int, ServedVersion] = field(default_factory=dict)


class ModelTable:
    """All models that this worker serves. Lives on the worker's loop."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._models: dict[str, _Model] = {}
        self._cores = config.threads_max or len(os.sched_getaffinity(0))
        self._inspector = Inspector()
        self._retiring: set[asyncio.Task[None]] = set()
        self._loaders = ThreadPoolExecutor(config.loads_at_once_max, thread_name_prefix="loader")

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

    async def load(
        self,
        name: str,
        config: ModelConfig | None,
        versions: Sequence[tuple[int, Path]],
        progress: TellProgress,
    ) -> LoadedModel:
        """Load these versions in place of what the model has.

        In a model that serves already, one failure leaves everything as it was; in one that does
        not, the versions that load are served and the others' reasons told.
        Raises ModelFileError or RepositoryError, of the newest failing version, when nothing
        changed.
        """
        prepared: list[PreparedVersion] = []
        failures: dict[int, Exception] = {}
        steps = len(versions) * STEPS_PER_VERSION
        try:
            for number, (version, path) in enumerate(versions):
                tell = _Phases(progress, number * STEPS_PER_VERSION, steps)
                try:
                    prepared.append(await self._prepare(name, version, path, config, tell))
                except (ModelFileError, ThirdrailError) as error:
                    failures[version] = error
            if failures and (name in self._models or not prepared):
                raise failures[max(failures)]
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
            engines={each.spec.version: VersionEngine(ENGINE_NAME) for each in prepared},
        )

    async def _prepare(
        self, name: str, version: int, path: Path, config: ModelConfig | None, tell: "_Phases"
    ) -> PreparedVersion:
        return await asyncio.get_running_loop().run_in_executor(
            self._loaders,
            prepare_version,
            name,
            version,
            path,
            config,
            self._config,
            self._cores,
            self._inspector,
            tell,
        )

    def _swap(self, name: str, prepared: Sequence[PreparedVersion]) -> None:
        new = _Model()
        for each in prepared:
            new.versions[each.spec.version] = ServedVersion(
                each.spec,
                each.engine,
                each.options.queue,
                instances=each.options.instances,
                place=each.place,
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

    async def _retire(self, model: _Model, reason: str) -> None:
        await asyncio.gather(
            *(v.retire(reason, self._config.drain_s_max) for v in model.versions.values())
        )

    def counters(self) -> list[metrics_pb2.ModelCounters]:
        return [
            served.counters()
            for _, model in sorted(self._models.items())
            for _, served in sorted(model.versions.items())
        ]


@dataclass(slots=True)
class _Phases:
    """Turns the phases of one version into steps of the whole load."""

    progress: TellProgress
    first: int
    steps: int
    _reached: int = 0

    def __call__(self, phase: str, step: int = 0, steps: int = 0) -> None:
        """step, steps: within the phase. One that is not known here belongs to the one before."""
        order = ("building", "proving", "warming up")
        if phase in order:
            self._reached = max(self._reached, order.index(phase))
        self.progress(LoadProgress(phase, self.first + self._reached, self.steps, step, steps))


def _in_place(prepared: PreparedVersion) -> frozenset[str]:
    return prepared.spec.positional_inputs & prepared.spec.inputs.keys()
