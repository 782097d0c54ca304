# SPDX-License-Identifier: Apache-2.0
"""A model as it is now, in one worker or joined from several, and how that changes. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from thirdrail.v1 import models_pb2 as pb
from thirdrail_server.control_messages import VersionEngine
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

LOADING = pb.MODEL_STATE_LOADING
READY = pb.MODEL_STATE_READY
UNLOADING = pb.MODEL_STATE_UNLOADING
UNAVAILABLE = pb.MODEL_STATE_UNAVAILABLE

_BEST_FIRST = (READY, LOADING, UNLOADING, UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class VersionStatus:
    version: int  # 0: no version is known
    state: pb.ModelState.ValueType
    reason: str = ""  # why it is not ready, or why what is ready could not be loaded anew


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as it is now. Any change makes a new one, so it can be kept and compared."""

    name: str
    versions: tuple[VersionStatus, ...]  # by number
    config: ModelConfig | None = None  # complete; None until it was loaded once. Not to be changed
    warnings: tuple[str, ...] = ()
    in_place: dict[int, tuple[str, ...]] = field(default_factory=dict)  # version -> inputs
    engines: dict[int, VersionEngine] = field(default_factory=dict)  # by version
    worker: str = ""  # several: their names, with commas
    load_phase: str = ""  # of a load under way
    is_expected_back: bool = False  # it lost its worker and will be loaded again
    instances: int = 0  # of all parts; 0: as the configuration says
    parts: "tuple[ServedModel, ...]" = ()  # by worker; none: it has but one

    @property
    def ready_versions(self) -> tuple[int, ...]:
        return tuple(each.version for each in self.versions if each.state == READY)

    def workers_of(self, version: int) -> tuple[str, ...]:
        """Those that serve a version now; 0 is the newest ready one."""
        wanted = version or max(self.ready_versions, default=0)
        parts = self.parts or (self,)
        return tuple(each.worker for each in parts if wanted in each.ready_versions)

    def engine_reason(self, version: int) -> str:
        """Why a version does not run on the engine of first choice; empty when it does."""
        return self.engines[version].reason if version in self.engines else ""

    def status(self, version: int) -> VersionStatus | None:
        return next((each for each in self.versions if each.version == version), None)


def all_unavailable(model: ServedModel, reason: str) -> ServedModel:
    """Every version becomes unavailable; those that already were keep their reason."""
    versions = tuple(
        each if each.state == UNAVAILABLE else VersionStatus(each.version, UNAVAILABLE, reason)
        for each in model.versions
    )
    return replace(model, versions=versions, engines={}, load_phase="")


def failed(part: ServedModel, reason: str) -> ServedModel:
    """No version of it serves."""
    numbers = [each.version for each in part.versions] or [0]
    versions = tuple(VersionStatus(number, UNAVAILABLE, reason) for number in numbers)
    return replace(part, versions=versions, engines={}, load_phase="", is_expected_back=False)


def without_improvement(part: ServedModel) -> ServedModel:
    """The engines that were to be replaced stay, since nobody builds others any more."""
    engines = {
        version: replace(engine, reason=_not_built(engine.reason), is_stopgap=False)
        if engine.is_stopgap
        else engine
        for version, engine in part.engines.items()
    }
    return replace(part, engines=engines)


def _not_built(reason: str) -> str:
    wanted = reason.partition(":")[0]
    return f"{wanted}: not built: the load that was to build it failed"


def with_ready_as(part: ServedModel, state: pb.ModelState.ValueType, reason: str) -> ServedModel:
    """Its ready versions are in another state now."""
    versions = tuple(
        VersionStatus(each.version, state, reason) if each.state == READY else each
        for each in part.versions
    )
    return replace(part, versions=versions)


def by_number(versions: Iterable[VersionStatus]) -> tuple[VersionStatus, ...]:
    return tuple(sorted(versions, key=lambda each: each.version))


def joined(parts: Sequence[ServedModel]) -> ServedModel:
    """What is told of a model that runs in several workers: it serves where one of them does."""
    if len(parts) == 1:
        return parts[0]
    whole = ServedModel(parts[0].name, _best_versions(parts), parts=tuple(parts))
    serving = [each for each in parts if each.ready_versions] or parts
    warnings = [text for each in parts for text in each.warnings]
    if whole.ready_versions:
        warnings += [text for each in parts if (text := _why_absent(each))]
    return replace(
        whole,
        config=next((each.config for each in serving if each.config is not None), None),
        warnings=tuple(dict.fromkeys(warnings)),
        in_place={v: names for each in reversed(serving) for v, names in each.in_place.items()},
        engines={number: _engines(serving, number) for number in whole.ready_versions},
        worker=", ".join(each.worker for each in serving),
        load_phase=next((each.load_phase for each in parts if each.load_phase), ""),
        is_expected_back=any(each.is_expected_back for each in parts),
        instances=sum(each.instances for each in serving),
    )


def _best_versions(parts: Sequence[ServedModel]) -> tuple[VersionStatus, ...]:
    found: dict[int, VersionStatus] = {}
    for each in (status for part in parts for status in part.versions):
        best = found.setdefault(each.version, each)
        if _BEST_FIRST.index(each.state) < _BEST_FIRST.index(best.state):
            found[each.version] = each
    if len(found) > 1:
        found.pop(0, None)  # some version is known
    return by_number(found.values())


def _why_absent(part: ServedModel) -> str:
    if part.ready_versions or part.versions[-1].state != UNAVAILABLE:
        return ""
    return f"not served by worker '{part.worker}': {part.versions[-1].reason}"


def _engines(parts: Sequence[ServedModel], version: int) -> VersionEngine:
    found = [each.engines[version] for each in parts if version in each.engines]
    if not found:
        return VersionEngine("")
    return replace(
        found[0],
        name=", ".join(dict.fromkeys(each.name for each in found)),
        reason="; ".join(dict.fromkeys(each.reason for each in found if each.reason)),
    )
