# SPDX-License-Identifier: Apache-2.0
"""A proof whose reference runs in a process of its own.

So the calls of other models meet no more of a proof than the runs of the engine itself: the
reference computes as slowly as others leave it time for, holds no lock of this process, and has a
memory of its own. Whatever it does to itself makes an engine that is not proven, and no more.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from thirdrail_engines.builds import run_reference
from thirdrail_engines.compiling import CompileServices, temporary_workspace
from thirdrail_engines.engine import Engine
from thirdrail_engines.expectation_file import NoExpectations, read_expectations
from thirdrail_engines.expectations import Expectation, ReferenceRequest, Skipped
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.reference_proof import (
    ReferenceProof,
    Tolerance,
    compare_runs,
    times_for,
    unproven,
)

_log = logging.getLogger(__name__)

_PLAN_NAME = "reference.plan"


def prove_apart(
    engine: Engine,
    request: ReferenceRequest,
    plan: memoryview | None,
    tolerance: Tolerance,
    services: CompileServices,
) -> ReferenceProof:
    """Compare the engine with what a process computes on request.

    plan: for `request.plan`, which is set here, as is `request.times`.
    Raises BuildError CANCELLED, and DeviceLost.
    """
    request = dataclasses.replace(request, times=times_for(engine.spec))
    try:
        return _proof(engine, request, plan, tolerance, services)
    except BuildError as error:
        if error.fault is BuildFault.CANCELLED:
            raise _cancelled(request) from None
        reason = str(error)
    except OSError as error:
        reason = f"a file cannot be written or read: {error.strerror}"
    except NoExpectations as error:
        reason = f"its process made no sense: it left {error}"
    return unproven(f"there is no reference to compare with: {reason}", tolerance)


def _proof(
    engine: Engine,
    request: ReferenceRequest,
    plan: memoryview | None,
    tolerance: Tolerance,
    services: CompileServices,
) -> ReferenceProof:
    """In the cache's folder, or among temporary files where that has no space, as builds are."""
    if services.cache is not None:
        try:
            with services.cache.workspace() as folder:
                return _proof_in(folder, engine, request, plan, tolerance, services)
        except BuildError as error:
            if error.fault is not BuildFault.OUT_OF_DISK:
                raise
            _log.warning("%s: it is proven without the cache: %s", request.source, error)
    with temporary_workspace() as folder:
        return _proof_in(folder, engine, request, plan, tolerance, services)


def _proof_in(
    folder: Path,
    engine: Engine,
    request: ReferenceRequest,
    plan: memoryview | None,
    tolerance: Tolerance,
    services: CompileServices,
) -> ReferenceProof:
    """folder: private, and removed at the end; what a killed worker left is removed later."""
    if plan is not None:
        request = dataclasses.replace(request, plan=folder / _PLAN_NAME)
        _write(folder / _PLAN_NAME, plan)
    return _compared(engine, request, folder, tolerance, services)


def _write(path: Path, data: memoryview) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BuildError(
            BuildFault.OUT_OF_DISK, f"cannot write into {path.parent}: {error.strerror}"
        ) from None


def _compared(
    engine: Engine,
    request: ReferenceRequest,
    folder: Path,
    tolerance: Tolerance,
    services: CompileServices,
) -> ReferenceProof:
    computed = run_reference(request, folder, services.limits, services.cancelled)
    for warning in computed.warnings:
        _log.warning("%s: for its proof, %s", request.source, warning)
    with computed.plan.open("rb") as file:
        spec, runs = read_expectations(file)
        return compare_runs(
            engine,
            spec,
            _unless_cancelled(runs, request, services),
            tolerance,
            request.limits,
            has_profiles=bool(request.profiles),
        )


def _unless_cancelled(
    runs: Iterable[Expectation | Skipped], request: ReferenceRequest, services: CompileServices
) -> Iterator[Expectation | Skipped]:
    for run in runs:
        if services.cancelled.is_set():
            raise _cancelled(request)
        yield run


def _cancelled(request: ReferenceRequest) -> BuildError:
    return BuildError(BuildFault.CANCELLED, f"the load of {request.source.name} was cancelled")
