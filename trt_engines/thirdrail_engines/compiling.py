# SPDX-License-Identifier: Apache-2.0
"""From a request to a plan: out of the cache if it is there, else built, by one builder at a time.

    lookup -> wait for whoever builds the same -> lookup again -> build in a workspace -> save

The cache is a help and never a condition: without one, or with a full disk, plans are built and
handed over unsaved.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from thirdrail_engines.build_timings import BuildTimings
from thirdrail_engines.builds import BuildLimits, BuiltPlan, run_build
from thirdrail_engines.cuda.device import Device
from thirdrail_engines.cuda.options import CudaOptions
from thirdrail_engines.plan_cache import (
    CacheFolderError,
    Digest,
    KnownDigests,
    Manifest,
    Plan,
    PlanCache,
    PlanKey,
    key_of,
    scratch_workspace,
)
from thirdrail_engines.plans import BuildError, BuildFault, PlanRequest, TellProgress
from thirdrail_engines.repetitions import once_each

_log = logging.getLogger(__name__)

_NO_LIMIT = 1 << 62


def tell_nobody(phase: str, done: int, steps: int) -> None:
    """A TellProgress for those who do not want to know."""


@dataclass(frozen=True, slots=True)
class CompileServices:
    """What a compilation, and the load of what it made, use besides the model.

    cache: None to keep no plans. device: where engines for a GPU go; None: the first there is.
    building: entered for as long as a plan is built or waited for; what it raises ends the load.
    digest: of a file, to look plans up by.
    """

    cache: PlanCache | None = None
    limits: BuildLimits = field(default_factory=BuildLimits)
    tell: TellProgress = tell_nobody
    cancelled: threading.Event = field(default_factory=threading.Event)
    building: Callable[[], AbstractContextManager[None]] = nullcontext
    device: Device | None = None
    cuda: CudaOptions = field(default_factory=CudaOptions)
    digest: Digest = field(default_factory=KnownDigests)


def compile_plan(request: PlanRequest, services: CompileServices) -> tuple[Plan, bool]:
    """The plan, and whether it was in the cache. In use there until it is released.

    Raises BuildError, or ModelFileError when the source or a plugin cannot be read.
    """
    key = key_of(request, services.digest)
    plan = services.cache.get(key) if services.cache else None
    if plan is not None:
        return plan, True
    with services.building():
        return _built_or_found(request, key, services)


def _built_or_found(
    request: PlanRequest, key: PlanKey, services: CompileServices
) -> tuple[Plan, bool]:
    if services.cache is None:
        return _built_unsaved(request, key, services), False
    try:
        with services.cache.building(key, services.cancelled, services.tell):
            plan = services.cache.get(key)
            if plan is not None:
                return plan, True
            return _built(request, key, services.cache, services), False
    except BuildError as error:
        if error.fault is not BuildFault.OUT_OF_DISK:
            raise
        _log.warning("%s: the plan is built without the cache: %s", request.source, error)
    return _built_unsaved(request, key, services), False


def _built(request: PlanRequest, key: PlanKey, cache: PlanCache, services: CompileServices) -> Plan:
    with cache.workspace() as folder:
        timings = BuildTimings(cache, request, folder)
        timings.lay_out()
        built = run_build(request, folder, services.limits, services.tell, services.cancelled)
        timings.take_back()
        _check_unchanged(request, key)
        for warning in once_each(built.warnings):
            _log.warning("%s: %s", request.source, warning)
        return cache.put(key, built.plan, _manifest(request, built, timings.figures))


def _built_unsaved(request: PlanRequest, key: PlanKey, services: CompileServices) -> Plan:
    """Built in a cache that is gone when the plan is here."""
    with temporary_workspace() as folder, _cache_in(folder) as cache:
        return _built(request, key, cache, services)


@contextmanager
def temporary_workspace() -> Iterator[Path]:
    """PlanCache.workspace for those without a cache. Raises BuildError OUT_OF_DISK."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_workspace())
        except (CacheFolderError, OSError) as error:  # which says where, or where all it tried
            raise BuildError(
                BuildFault.OUT_OF_DISK, f"there is no folder to build in: {error}"
            ) from None
        yield folder


def _cache_in(folder: Path) -> PlanCache:
    try:
        return PlanCache(folder, _NO_LIMIT)
    except (CacheFolderError, OSError) as error:
        raise BuildError(
            BuildFault.OUT_OF_DISK, f"there is no folder to build in: {error}"
        ) from None


def _check_unchanged(request: PlanRequest, key: PlanKey) -> None:
    """Whether the build read what the key names. A file may be replaced at any moment."""
    if key_of(request).digest != key.digest:
        raise BuildError(
            BuildFault.SOURCE_CHANGED,
            f"{request.source.name} (or a file that it uses) changed while its plan was built; "
            "load the model again",
        )


def _manifest(
    request: PlanRequest, built: BuiltPlan, timings: Mapping[str, int] | None
) -> Manifest:
    return Manifest(
        source=str(request.source.absolute()),
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        build_s=round(built.seconds, 3),
        peak_rss_bytes=built.peak_memory_bytes,
        layers={"plan": dict(built.layers), "source": dict(built.source_layers)},
        tensors=[
            {
                "name": tensor.name,
                "direction": "input" if tensor.is_input else "output",
                "type": tensor.dtype,
                "shape": list(tensor.shape),
            }
            for tensor in built.tensors
        ],
        precision=built.conversion,
        warnings=built.warnings,
        timing_cache=timings,
    )
