# SPDX-License-Identifier: Apache-2.0
"""What the server knows about its models: which there are, what state each version is in, and why.

Pure: it is told what happened and answers questions. The front's servicers read it,
model_control.py and worker_models.py write it.

A model that runs on several devices has a part in each of their workers, with a state of its own;
what is told about the model is joined from its parts.

A model that is known always has at least one VersionStatus; version 0 stands for "no version is
known". A version stays READY while its model is being loaded again, because it goes on serving.
"""

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from thirdrail.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from thirdrail_server.control_messages import LoadedModel
from thirdrail_server.front.control.served_model import (
    LOADING,
    READY,
    UNAVAILABLE,
    UNLOADING,
    ServedModel,
    VersionStatus,
    all_unavailable,
    by_number,
    failed,
    joined,
    with_ready_as,
    without_improvement,
)

UNLOADED = "unloaded"
NOT_LOADED = "not loaded"  # and never was
EVICTED = "evicted to make room for"
RELOAD_FAILED = "the last reload failed, what was loaded before is serving"
VERSION_MAX = (1 << 63) - 1


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
        self._parts: dict[str, dict[str, ServedModel]] = {}  # by model and worker; "": not placed
        self._startup: set[str] | None = None  # None: not known yet
        self._workers: dict[str, bool] = {}  # whether it is up
        self._starting: set[str] = set()  # workers that were never up
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
        """Whether every worker has started, one of them is up, and every model that the server
        started with is ready.

        A model that somebody unloaded on purpose counts no more.
        """
        if self._startup is None or self.is_stopping or not self._has_workers():
            return False
        return all(self.is_ready(name) for name in self._startup)

    def startup_names(self) -> list[str]:
        """Of the models that the server started with, less those unloaded on purpose. Sorted."""
        return sorted(self._startup or ())

    def is_settled(self) -> bool:
        """Whether every worker is up, and no load is under way or waits for its turn."""
        if self._startup is None or not all(self._workers.values()):
            return False
        parts = (part for parts in self._parts.values() for part in parts.values())
        return not any(each.state == LOADING for part in parts for each in part.versions)

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

    def list_not_loaded(self, name: str, versions: Iterable[int]) -> None:
        """It lies in the repository and was not asked for. Raises ResourceExhausted."""
        self._make_room(name)
        statuses = tuple(VersionStatus(number, UNAVAILABLE, NOT_LOADED) for number in versions)
        none_known = (VersionStatus(0, UNAVAILABLE, NOT_LOADED),)
        self._put(ServedModel(name, by_number(statuses or none_known)))

    def place(self, name: str, workers: Sequence[str]) -> None:
        """It is about to be loaded there. What is left of it elsewhere and serves no more goes."""
        for worker, part in list(self._parts.get(name, {}).items()):
            if worker and worker not in workers and not part.ready_versions:
                self.leave(name, worker)

    def leave(self, name: str, worker: str) -> None:
        """It does not belong to this worker any more, and belongs to another one."""
        parts = self._parts.get(name, {})
        part = parts.pop(worker, None)
        if part is not None:
            if not parts:
                parts[""] = replace(part, worker="")
            self._join(name)

    def begin_load(self, name: str, versions: Iterable[int], worker: str) -> None:
        """Raises ResourceExhausted when there are too many models."""
        self._make_room(name)
        model = self._parts.get(name, {}).get(worker) or ServedModel(name, ())
        ready = set(model.ready_versions)
        kept = tuple(each for each in model.versions if each.version in ready)
        new = (VersionStatus(v, LOADING, "loading") for v in versions if v not in ready)
        statuses = by_number((*kept, *new)) or (VersionStatus(0, LOADING, "loading"),)
        self._put(
            replace(
                model,
                versions=statuses,
                worker=worker,
                load_phase="reading",
                is_expected_back=False,
            )
        )

    def tell_phase(self, name: str, phase: str, worker: str = "") -> None:
        """How far the load of a model has come, in a word."""
        for part in self._parts_of(name, worker):
            if part.load_phase and part.load_phase != phase:
                self._put(replace(part, load_phase=phase))

    def end_load(self, name: str, loaded: LoadedModel, worker: str, instances: int = 0) -> None:
        """It serves. Versions that are not among the loaded ones are gone."""
        versions = (
            VersionStatus(number, READY if failure is None else UNAVAILABLE, failure or "")
            for number, failure in loaded.versions.items()
        )
        self._put(
            ServedModel(
                name,
                by_number(versions),
                loaded.config,
                tuple(loaded.warnings),
                {number: tuple(names) for number, names in loaded.in_place.items()},
                dict(loaded.engines),
                worker,
                instances=instances,
            )
        )

    # Of these, `worker` names one part; empty: all of them

    def cancel_load(self, name: str, worker: str = "") -> None:
        """Somebody wanted it to end: what was serving goes on serving."""
        for part in self._parts_of(name, worker):
            kept = tuple(each for each in part.versions if each.state == READY)
            if kept:
                self._put(replace(part, versions=kept, load_phase=""))
            else:
                self._put(failed(part, "the load was cancelled"))

    def fail_load(self, name: str, reason: str, worker: str = "") -> None:
        """What was serving goes on serving, and says what happened."""
        for part in self._parts_of(name, worker) or [ServedModel(name, (), worker=worker)]:
            kept = [each for each in part.versions if each.state == READY]
            if not kept:
                self._put(failed(part, reason))
                continue
            told = f"{RELOAD_FAILED}: {reason}"
            versions = tuple(replace(each, reason=told) for each in kept)
            old = (text for text in part.warnings if not text.startswith(RELOAD_FAILED))
            told_of = replace(part, versions=versions, warnings=(*old, told), load_phase="")
            self._put(without_improvement(told_of))

    def interrupt(self, name: str, worker: str = "") -> None:
        """It serves no longer, because it is being loaded anew."""
        for part in self._parts_of(name, worker):
            self._put(with_ready_as(part, LOADING, "loading"))

    def begin_unload(self, name: str) -> None:
        for part in self._parts_of(name, ""):
            self._put(with_ready_as(part, UNLOADING, "unloading"))

    def end_unload(self, name: str, reason: str = UNLOADED, worker: str = "") -> None:
        """It is out of memory, on purpose."""
        for part in self._parts_of(name, worker):
            # A worker's death is no reason any more for what was to come back.
            ended = failed if part.is_expected_back else all_unavailable
            self._put(ended(part, reason))
        if self._startup is not None and not self._models[name].ready_versions:
            self._startup.discard(name)

    def remove(self, name: str) -> None:
        """It is no longer in the repository, and not loaded."""
        self._models.pop(name, None)
        self._parts.pop(name, None)
        if self._startup is not None:
            self._startup.discard(name)
        self._tell(name)

    def begin_stop(self) -> None:
        """The server is going away: it is not ready any more, and watches end."""
        self.is_stopping = True
        self._tell("")

    def expect_worker(self, worker: str) -> None:
        """The server is not ready before this worker has started."""
        self._workers[worker] = False
        self._starting.add(worker)

    def worker_started(self, worker: str) -> None:
        self._workers[worker] = True
        self._starting.discard(worker)
        self._tell("")

    def worker_died(self, worker: str, coming_back: Iterable[str]) -> None:
        """What runs there is gone. coming_back: those models that will be loaded again."""
        self._workers[worker] = False
        names = set(coming_back)
        reason = f"worker '{worker}' died; restarting"
        for name in list(self._parts):
            for part in self._parts_of(name, worker):
                # What is being unloaded has the end that it was to have.
                if any(each.state in (LOADING, READY) for each in part.versions):
                    lost = all_unavailable(part, reason)
                    self._put(replace(lost, is_expected_back=name in names))
        self._tell("")

    def _has_workers(self) -> bool:
        return not self._starting and (not self._workers or any(self._workers.values()))

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

    def _parts_of(self, name: str, worker: str) -> list[ServedModel]:
        """One part, or for "" all; none where there is none."""
        parts = self._parts.get(name, {})
        return [part for key, part in parts.items() if worker in ("", key)]

    def _put(self, part: ServedModel) -> None:
        parts = self._parts.setdefault(part.name, {})
        if part.worker:
            parts.pop("", None)
        parts[part.worker] = part
        self._join(part.name)

    def _join(self, name: str) -> None:
        order, parts = list(self._workers), self._parts[name]
        names = sorted(parts, key=lambda each: order.index(each) if each in order else -1)
        self._models[name] = joined([parts[each] for each in names])
        self._tell(name)

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
