# SPDX-License-Identifier: Apache-2.0
"""What the server knows about its models: which there are, what state each version is in, and why.

Pure: it is told what happened and answers questions. The front's servicers read it,
model_control.py and the supervisor's news write it.

A model that is known always has at least one VersionStatus; version 0 stands for "no version is
known". A version stays READY while its model is being loaded again, because it goes on serving.
"""

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from thirdrail.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from thirdrail.v1 import models_pb2 as pb
from thirdrail_server.control_messages import LoadedModel, VersionEngine
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

LOADING = pb.MODEL_STATE_LOADING
READY = pb.MODEL_STATE_READY
UNLOADING = pb.MODEL_STATE_UNLOADING
UNAVAILABLE = pb.MODEL_STATE_UNAVAILABLE

UNLOADED = "unloaded"
EVICTED = "evicted to make room for"
RELOAD_FAILED = "the last reload failed, what was loaded before is serving"
VERSION_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class VersionStatus:
    version: int  # 0: no version is known
    state: pb.ModelState.ValueType
    reason: str = ""  # why it is not ready; empty when it is


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as it is now. Any change makes a new one, so it can be kept and compared."""

    name: str
    versions: tuple[VersionStatus, ...]  # by number
    config: ModelConfig | None = None  # complete; None until it was loaded once. Not to be changed
    warnings: tuple[str, ...] = ()
    in_place: dict[int, tuple[str, ...]] = field(default_factory=dict)  # version -> inputs
    engines: dict[int, VersionEngine] = field(default_factory=dict)  # by version
    worker: str = ""
    load_phase: str = ""  # of a load under way
    is_expected_back: bool = False  # it lost its worker and will be loaded again

    @property
    def ready_versions(self) -> tuple[int, ...]:
        return tuple(each.version for each in self.versions if each.state == READY)

    def engine_reason(self, version: int) -> str:
        """Why a version does not run on the engine of first choice; empty when it does."""
        return self.engines[version].reason if version in self.engines else ""

    def status(self, version: int) -> VersionStatus | None:
        return next((each for each in self.versions if each.version == version), None)


class Subscription:
    """Names of models that changed, for one reader; "" when the server as a whole did.

    It is a context manager and an iterator, which ends when the server begins to stop.

    Bounded by being a set: a model that changes twice before the reader comes is told once, and
    the reader finds its newest state in the catalog. A reader that stalls therefore costs nothing
    and misses only history.
    """

    def __init__(self, catalog: "Catalog") -> None:
        self._catalog = catalog
        self._changed: dict[str, None] = {}
        self._wake = asyncio.Event()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> str:
        while not self._changed:
            if self._catalog.is_stopping:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        name = next(iter(self._changed))
        del self._changed[name]
        return name

    def __enter__(self) -> "Subscription":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._catalog._subscriptions.discard(self)

    def _tell(self, name: str) -> None:
        self._changed[name] = None
        self._wake.set()


class Catalog:
    """All models by name. Not thread-safe: it lives on the front's event loop."""

    def __init__(self, models_max: int, watchers_max: int) -> None:
        self._models_max = models_max
        self._watchers_max = watchers_max
        self._models: dict[str, ServedModel] = {}
        self._startup: set[str] | None = None  # None: not known yet
        self._workers_down: set[str] = set()
        self._subscriptions: set[Subscription] = set()
        self.is_stopping = False

    # Questions

    def models(self) -> list[ServedModel]:
        """Sorted by name; broken and unloaded ones are among them."""
        return [self._models[name] for name in sorted(self._models)]

    def get(self, name: str) -> ServedModel | None:
        return self._models.get(name)

    def find(self, name: str, version: str | int = 0) -> tuple[ServedModel, int]:
        """The model, and the version that a request gets; "" and 0 mean the newest ready one.

        Raises NotFound, Unavailable (it may come back by itself), InvalidArgument (not a version).
        """
        wanted = parse_version(version)
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if wanted:
            return self._find_version(model, wanted)
        ready = model.ready_versions
        if ready:
            return model, ready[-1]
        for each in model.versions:
            if each.state == LOADING or model.is_expected_back:
                raise _not_ready(name, each)
        raise NotFound(
            f"Request for unknown model: '{name}' has no available versions{_eviction(model)}"
        )

    def is_ready(self, name: str, version: str | int = 0) -> bool:
        """False also for what is not there. Raises InvalidArgument for a bad version."""
        try:
            self.find(name, version)
        except (NotFound, Unavailable):
            return False
        return True

    def all_ready(self) -> bool:
        """Whether every worker is up and every model that the server started with is ready.

        A model that somebody unloaded on purpose counts no more.
        """
        if self._startup is None or self._workers_down or self.is_stopping:
            return False
        return all(self.is_ready(name) for name in self._startup)

    def startup_names(self) -> list[str]:
        """Of the models that the server started with, less those unloaded on purpose. Sorted."""
        return sorted(self._startup or ())

    def is_settled(self) -> bool:
        """Whether every worker is up, and no load is under way or waits for its turn."""
        if self._startup is None or self._workers_down:
            return False
        return not any(
            each.state == LOADING for model in self._models.values() for each in model.versions
        )

    def subscribe(self) -> Subscription:
        """Raises ResourceExhausted when too many are watching already."""
        if len(self._subscriptions) >= self._watchers_max:
            raise ResourceExhausted(f"{self._watchers_max} callers are watching, the most allowed")
        subscription = Subscription(self)
        self._subscriptions.add(subscription)
        return subscription

    # News

    def expect(self, names: Iterable[str]) -> None:
        """These models make up the server: it is ready when they are. Raises ResourceExhausted."""
        self._startup = set(names)
        for name in sorted(self._startup - self._models.keys()):
            self._make_room(name)
            self._put(ServedModel(name, (VersionStatus(0, LOADING, "waiting to be loaded"),)))

    def list_unloaded(self, name: str, versions: Iterable[int]) -> None:
        """It lies in the repository and was not asked for. Raises ResourceExhausted."""
        self._make_room(name)
        statuses = tuple(VersionStatus(number, UNAVAILABLE, UNLOADED) for number in versions)
        none_known = (VersionStatus(0, UNAVAILABLE, UNLOADED),)
        self._put(ServedModel(name, _by_number(statuses or none_known)))

    def begin_load(self, name: str, versions: Iterable[int], worker: str) -> None:
        """Raises ResourceExhausted when there are too many models."""
        self._make_room(name)
        model = self._models.get(name) or ServedModel(name, ())
        ready = set(model.ready_versions)
        kept = tuple(each for each in model.versions if each.version in ready)
        new = (VersionStatus(v, LOADING, "loading") for v in versions if v not in ready)
        statuses = _by_number((*kept, *new)) or (VersionStatus(0, LOADING, "loading"),)
        self._put(
            replace(
                model,
                versions=statuses,
                worker=worker,
                load_phase="reading",
                is_expected_back=False,
            )
        )

    def tell_phase(self, name: str, phase: str) -> None:
        """How far the load of a model has come, in a word."""
        model = self._models.get(name)
        if model is not None and model.load_phase and model.load_phase != phase:
            self._put(replace(model, load_phase=phase))

    def end_load(self, name: str, loaded: LoadedModel, worker: str) -> None:
        """It serves. Versions that are not among the loaded ones are gone."""
        versions = (
            VersionStatus(number, READY if failure is None else UNAVAILABLE, failure or "")
            for number, failure in loaded.versions.items()
        )
        self._put(
            ServedModel(
                name,
                _by_number(versions),
                loaded.config,
                tuple(loaded.warnings),
                {number: tuple(names) for number, names in loaded.in_place.items()},
                dict(loaded.engines),
                worker,
            )
        )

    def cancel_load(self, name: str) -> None:
        """Somebody wanted it to end: what was serving goes on serving."""
        model = self._models.get(name)
        kept = tuple(each for each in model.versions if each.state == READY) if model else ()
        if model is None or not kept:
            self.fail_load(name, "the load was cancelled")
        else:
            self._put(replace(model, versions=kept, load_phase=""))

    def fail_load(self, name: str, reason: str) -> None:
        """What was serving goes on serving, and says in its warnings what happened."""
        model = self._models.get(name) or ServedModel(name, ())
        kept = tuple(each for each in model.versions if each.state == READY)
        if kept:
            old = (text for text in model.warnings if not text.startswith(RELOAD_FAILED))
            warnings = (*old, f"{RELOAD_FAILED}: {reason}")
            self._put(replace(model, versions=kept, warnings=warnings, load_phase=""))
            return
        numbers = [each.version for each in model.versions] or [0]
        failed = tuple(VersionStatus(number, UNAVAILABLE, reason) for number in numbers)
        lost = replace(model, versions=failed, engines={}, load_phase="")
        self._put(replace(lost, is_expected_back=False))

    def interrupt(self, name: str) -> None:
        """It serves no longer, because it is being loaded anew."""
        model = self._models[name]
        versions = tuple(
            VersionStatus(each.version, LOADING, "loading") if each.state == READY else each
            for each in model.versions
        )
        self._put(replace(model, versions=versions))

    def begin_unload(self, name: str) -> None:
        model = self._models[name]
        versions = tuple(
            VersionStatus(each.version, UNLOADING, "unloading") if each.state == READY else each
            for each in model.versions
        )
        self._put(replace(model, versions=versions))

    def end_unload(self, name: str, reason: str = UNLOADED) -> None:
        """It is out of memory, on purpose."""
        if self._startup is not None:
            self._startup.discard(name)
        model = replace(self._models[name], is_expected_back=False)
        self._put(_all_unavailable(model, reason))

    def remove(self, name: str) -> None:
        """It is no longer in the repository, and not loaded."""
        self._models.pop(name, None)
        if self._startup is not None:
            self._startup.discard(name)
        self._tell(name)

    def begin_stop(self) -> None:
        """The server is going away: it is not ready any more, and watches end."""
        self.is_stopping = True
        self._tell("")

    def expect_worker(self, worker: str) -> None:
        """The server is not ready before this worker has started."""
        self._workers_down.add(worker)

    def worker_started(self, worker: str) -> None:
        self._workers_down.discard(worker)
        self._tell("")

    def worker_died(self, worker: str, coming_back: Iterable[str]) -> None:
        """Its models are gone. coming_back: those that will be loaded again."""
        self._workers_down.add(worker)
        names = set(coming_back)
        reason = f"worker '{worker}' died; restarting"
        for model in list(self._models.values()):
            if model.worker == worker and any(each.state != UNAVAILABLE for each in model.versions):
                lost = _all_unavailable(model, reason)
                self._put(replace(lost, is_expected_back=model.name in names))
        self._tell("")

    def _find_version(self, model: ServedModel, wanted: int) -> tuple[ServedModel, int]:
        status = model.status(wanted)
        if status is None:
            raise NotFound(
                f"Request for unknown model: '{model.name}' version {wanted} is not found"
            )
        if status.state != READY:
            raise _not_ready(model.name, status)
        return model, wanted

    def _make_room(self, name: str) -> None:
        if name not in self._models and len(self._models) >= self._models_max:
            raise ResourceExhausted(f"{self._models_max} models are known, the most allowed")

    def _put(self, model: ServedModel) -> None:
        self._models[model.name] = model
        self._tell(model.name)

    def _tell(self, name: str) -> None:
        for subscription in self._subscriptions:
            subscription._tell(name)


def parse_version(version: str | int) -> int:
    """A version as requests name it; "" and the number 0 are 0. Raises InvalidArgument."""
    if version in ("", 0):
        return 0
    text = str(version)
    if not re.fullmatch(r"[0-9]{1,19}", text):
        detail = "not a decimal number"
    elif not 0 < int(text) <= VERSION_MAX:
        detail = "out of range"
    else:
        return int(text)
    raise InvalidArgument(
        f"failed to get model version from specified version string '{text[:64]}' "
        f"(details: {detail}), version should be an integral value > 0"
    )


def _not_ready(name: str, status: VersionStatus) -> Unavailable:
    version = f" version {status.version}" if status.version else ""
    why = f": {status.reason}" if status.reason else ""
    return Unavailable(f"Request for unknown model: '{name}'{version} is not at ready state{why}")


def _eviction(model: ServedModel) -> str:
    reasons = {each.reason for each in model.versions if each.reason.startswith(EVICTED)}
    return f": {reasons.pop()}" if reasons else ""


def _all_unavailable(model: ServedModel, reason: str) -> ServedModel:
    """Every version becomes unavailable; those that already were keep their reason."""
    versions = tuple(
        each if each.state == UNAVAILABLE else VersionStatus(each.version, UNAVAILABLE, reason)
        for each in model.versions
    )
    return replace(model, versions=versions, engines={}, load_phase="")


def _by_number(versions: Iterable[VersionStatus]) -> tuple[VersionStatus, ...]:
    return tuple(sorted(versions, key=lambda each: each.version))
