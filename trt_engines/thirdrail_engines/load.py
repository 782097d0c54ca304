# SPDX-License-Identifier: Apache-2.0
"""From a model file to an engine that runs it, and a report which one and why.

An ONNX file for the CPU is read by ONNX Runtime, and that is all. Everything else goes through an
order of engines (engine_choice.py): each is built, loaded and proven (one_engine.py), and where
that fails, the policy says whether the next one is tried. What failed is in the report.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from thirdrail_engines.compile_options import CompileOptions, EngineChoice, OnFailure
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.engine_choice import (
    TORCH_SUFFIXES,
    Candidate,
    engine_order,
)
from thirdrail_engines.engine_report import Attempt, EngineReport, LoadedEngine
from thirdrail_engines.expectations import Reference
from thirdrail_engines.host import host_of
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.profiles import ProfileError

if TYPE_CHECKING:  # imported late: most models need no plan
    from thirdrail_engines.compiling import CompileServices
    from thirdrail_engines.one_engine import EngineLoader

_log = logging.getLogger(__name__)

_PLAN_SUFFIXES = (".plan", ".engine")
_EXPECTED = "expected model.onnx, model.pt2, model.pt or model.plan"


class NoEngine(ModelFileError):
    """No engine runs the model. The text holds every reason once; `attempts` each by itself."""

    def __init__(self, path: Path, attempts: Sequence[Attempt]) -> None:
        reasons = "; ".join(
            f"{', '.join(f'{each.engine}: {each.fault}' for each in alike)}: {reason}"
            for reason, alike in groupby(attempts, lambda each: each.reason)
        )
        super().__init__(f"{path.name} is run by no engine: {reasons}")
        self.attempts = tuple(attempts)


@dataclass(frozen=True, slots=True)
class BegunLoad:
    """now: an engine that may answer already. later: compiles, and returns the one that is to take
    its place; None where `now` is the final one.

    `later` is called once, from any thread. It raises NoEngine, whose attempts say why `now` has to
    stay; BuildError CANCELLED; or ProfileError for a configuration that contradicts the model.
    """

    now: LoadedEngine
    later: Callable[[], LoadedEngine] | None = None


def load(
    path: Path,
    *,
    options: EngineOptions,
    inspector: Inspector | None = None,
    compile: CompileOptions | None = None,  # noqa: A002 it is what they are
    services: "CompileServices | None" = None,
) -> LoadedEngine:
    """Load the model file at `path`. Builds a plan where one is wanted and not in the cache.

    inspector: one that several loads share, so that they start one child process between them.
    Raises ModelFileError when no engine runs it, or the first one does not and the policy is to
    fail; BuildError among them, for what a build says, and ProofError for a proof that failed.
    """
    if path.suffix in _PLAN_SUFFIXES:
        from thirdrail_engines.bare_plans import load_bare_plan

        return load_bare_plan(path, services)
    wanted = compile or CompileOptions()
    order = _order(path, wanted, services)
    if len(order) == 1 and order[0].reads_model and not (wanted.profiles or wanted.proof_values):
        return _read(path, options, inspector)
    with _loader(path, options, inspector, wanted, services) as loader:
        return _first_of(loader, order, wanted.on_failure)


def begin_load(
    path: Path,
    *,
    options: EngineOptions,
    inspector: Inspector | None = None,
    compile: CompileOptions | None = None,  # noqa: A002
    services: "CompileServices | None" = None,
) -> BegunLoad:
    """The same in two steps where `compile.serve_while_compiling` says so and a build is needed.

    Until it is done, ONNX Runtime reads the model file. Raises as `load` does.
    """
    wanted = compile or CompileOptions()
    if path.suffix in _PLAN_SUFFIXES or not wanted.serve_while_compiling:
        return BegunLoad(
            load(path, options=options, inspector=inspector, compile=wanted, services=services)
        )
    order = _order(path, wanted, services)
    *before, last = order
    if not (before and last.reads_model):
        with _loader(path, options, inspector, wanted, services) as loader:
            return BegunLoad(_first_of(loader, order, wanted.on_failure))
    attempts: list[Attempt] = []
    with _loader(path, options, inspector, wanted, _building_nothing(services)) as loader:
        try:
            return BegunLoad(_first_of(loader, order, wanted.on_failure, attempts))
        except _BuildPutOff:
            better = order[len(attempts)].name
            waiting = Attempt(better, "compiling", "its plan is being built and proven")
            now = loader.load(last, (*attempts, waiting))

    def later() -> LoadedEngine:
        # A loader of its own: whoever shares the inspector may have closed it by now.
        with _loader(path, options, None, wanted, services) as loader:
            return _first_of(loader, before, wanted.on_failure, is_last=False)

    return BegunLoad(now, later)


class _BuildPutOff(Exception):
    """A plan is not there, and shall not be built now."""


def _building_nothing(services: "CompileServices | None") -> "CompileServices":
    from thirdrail_engines.compiling import CompileServices

    def put_off() -> AbstractContextManager[None]:
        raise _BuildPutOff

    return dataclasses.replace(services or CompileServices(), building=put_off)


def stays(report: EngineReport, error: ModelFileError) -> EngineReport:
    """The report of an engine that was to be replaced, after `later` raised this."""
    attempts = error.attempts if isinstance(error, NoEngine) else ()
    return EngineReport(report.engine, attempts or report.attempts)


def _order(
    path: Path, wanted: CompileOptions, services: "CompileServices | None"
) -> tuple[Candidate, ...]:
    """Raises ModelFileError for a file of an unknown kind, and for a reference that is none."""
    if path.suffix == ".py":
        raise ModelFileError(f"{path.name}: Python models are not served, {_EXPECTED}")
    if path.suffix not in (".onnx", *TORCH_SUFFIXES):
        raise ModelFileError(f"{path.name}: unknown kind of model file, {_EXPECTED}")
    if wanted.proof_reference is Reference.TORCH and path.suffix != ".pt2":
        raise ProfileError(
            f"parameters['proof_reference'] is torch, which does not run {path.name}: it runs "
            "model.pt2, so leave the parameter out"
        )
    keeps_plans = services is not None and services.cache is not None
    return engine_order(path.suffix, wanted, host_of(path.suffix), keeps_plans=keeps_plans)


def _read(path: Path, options: EngineOptions, inspector: Inspector | None) -> LoadedEngine:
    """What most models need, without importing what the others do."""
    from thirdrail_engines.onnxruntime_engine import load_onnx

    with nullcontext(inspector) if inspector else Inspector() as used:
        engine = load_onnx(path, options=options, inspector=used)
    return LoadedEngine(engine, EngineReport(str(EngineChoice.ONNXRUNTIME)))


@contextmanager
def _loader(
    path: Path,
    options: EngineOptions,
    inspector: Inspector | None,
    wanted: CompileOptions,
    services: "CompileServices | None",
) -> "Iterator[EngineLoader]":
    from thirdrail_engines.one_engine import EngineLoader

    with (
        nullcontext(inspector) if inspector else Inspector() as used,
        EngineLoader(path, options, used, wanted, services) as loader,
    ):
        yield loader


def _first_of(
    loader: "EngineLoader",
    order: Sequence[Candidate],
    on_failure: OnFailure,
    attempts: list[Attempt] | None = None,
    *,
    is_last: bool = True,
) -> LoadedEngine:
    """The first that loads and is proven. is_last: nothing else can run the model after these.

    attempts: where those are noted that failed, also for a caller who meets an exception.
    """
    attempts = [] if attempts is None else attempts
    for candidate in order:
        try:
            return loader.load(candidate, tuple(attempts))
        except ModelFileError as error:
            is_only = is_last and len(order) == 1
            if is_only or on_failure is OnFailure.FAIL or _is_final(error):
                raise
            attempts.append(_attempt(candidate, error))
            _log.warning("%s: %s cannot be used: %s", loader.path, candidate.name, error)
    raise NoEngine(loader.path, attempts)


def _is_final(error: ModelFileError) -> bool:
    """No other engine would change it: the caller's wish, or a mistake in the configuration."""
    if isinstance(error, BuildError):
        return error.fault is BuildFault.CANCELLED
    return isinstance(error, ProfileError)


def _attempt(candidate: Candidate, error: ModelFileError) -> Attempt:
    from thirdrail_engines.proving import ProofError

    if isinstance(error, ProofError):
        return Attempt(candidate.name, "not proven", "; ".join(error.proof.faults))
    fault = error.fault.value if isinstance(error, BuildError) else "not loadable"
    return Attempt(candidate.name, fault, str(error))
