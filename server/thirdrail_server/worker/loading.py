# SPDX-License-Identifier: Apache-2.0
"""One model version from its file to ready: engine, configuration, proof, warm-up.

Runs on a loader thread; nothing of it is visible to callers until the model table takes it in.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import thirdrail_engines
from thirdrail.tensors import Array
from thirdrail_engines import EngineOptions, EngineReport, Inspector, LoadedEngine, threads_per_run
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.engine import Engine, EngineError, EngineSpec, ModelFileError
from thirdrail_engines.load import begin_load
from thirdrail_engines.plans import TellProgress
from thirdrail_engines.proof import prove_batching, seeded_inputs
from thirdrail_server.config import WorkerConfig
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.complete import complete, may_derive_batching
from thirdrail_server.repository.options import (
    ModelOptions,
    engine_threads,
    instance_count,
    model_options,
)
from thirdrail_server.worker.memory import UNKNOWN, Weight
from thirdrail_server.worker.run_place import RunPlace
from thirdrail_server.worker.version_spec import VersionSpec

if TYPE_CHECKING:
    from thirdrail_engines.compiling import CompileServices

# Trial runs of a model that may be small enough for the loop. One quiet round is enough: in the
# others a busy host may have been at work.
TRIAL_ROUNDS = 5
TRIAL_RUNS = 100
TRIAL_BUDGET_NS_MAX = 20_000_000
TRIAL_ELEMENTS_MAX = 4096  # of one input; an open dimension that could exceed it is the size rule's


@dataclass(frozen=True, slots=True)
class EngineWish:
    """Which engine a version shall have. Without services none that has to be built.

    takes_stopgap: another one will do for now, if this one has to be built first.
    instances: on this worker's device; 0: as the configuration says.
    """

    compile: CompileOptions = field(default_factory=CompileOptions)
    services: "CompileServices | None" = None
    takes_stopgap: bool = False
    instances: int = 0


@dataclass(frozen=True, slots=True)
class PreparedVersion:
    """Everything a model version needs to take requests. Whoever drops it closes the engine."""

    spec: VersionSpec
    engine: Engine
    options: ModelOptions
    config: ModelConfig  # complete
    place: RunPlace
    notes: tuple[str, ...]  # what the load decided, for people
    report: EngineReport
    is_stopgap: bool  # the engine serves until a better one is built
    weight: Weight = UNKNOWN


def prepare_version(
    name: str,
    version: int,
    path: Path,
    given: ModelConfig | None,
    config: WorkerConfig,
    cores: int,
    inspector: Inspector,
    tell: TellProgress,
    wish: EngineWish | None = None,
) -> PreparedVersion:
    """Load, complete, prove and warm up one version.

    Raises ModelFileError or RepositoryError; then nothing is left loaded.
    """
    tell("building", 0, 0)
    asked, wish = given or ModelConfig(), wish or EngineWish()
    instances = wish.instances or instance_count(asked)
    threads = engine_threads(asked) or threads_per_run(cores, instances)
    options_of_engine = EngineOptions(threads_max=threads, instances=instances)
    loaded, is_stopgap = _load(path, options_of_engine, inspector, wish)
    engine = loaded.engine
    try:
        proven_rows, notes = _proven_rows(engine, given, config.derive_batch_rows, tell)
        whole = complete(
            name,
            given,
            engine.spec,
            proven_rows=proven_rows,
            filename=path.name,
            is_on_gpu=bool(config.device),
        )
        options = model_options(
            whole, path.parent.parent, queue_requests_max=config.queue_requests_max
        )
        options = replace(options, instances=instances)
        spec = _version_spec(name, version, options, engine.spec)
        tell("warming up", 0, 0)
        _warm_up(engine, options, spec)
        place = _run_place(engine, options, config)
    except BaseException:
        engine.close()
        raise
    all_notes = (*options.warnings, *notes)
    return PreparedVersion(
        spec, engine, options, whole, place, all_notes, loaded.report, is_stopgap
    )


def _load(
    path: Path, options: EngineOptions, inspector: Inspector, wish: EngineWish
) -> tuple[LoadedEngine, bool]:
    if wish.services is None or not wish.takes_stopgap:
        loaded = thirdrail_engines.load(
            path,
            options=options,
            inspector=inspector,
            compile=wish.compile,
            services=wish.services,
        )
        return loaded, False
    begun = begin_load(
        path, options=options, inspector=inspector, compile=wish.compile, services=wish.services
    )
    return begun.now, begun.later is not None


def _proven_rows(
    engine: Engine, given: ModelConfig | None, rows: int, tell: TellProgress
) -> tuple[int, tuple[str, ...]]:
    """The batch size that nobody configured but a proof allows; 0 for none."""
    if rows < 1 or not may_derive_batching(given, engine.spec):
        return 0, ()
    tell("proving", 0, 0)
    proof = prove_batching(engine, rows)
    if not proof.agreed:
        return 0, (f"batching was not derived: {proof.reason}",)
    return rows, (f"batching of up to {rows} rows was derived: single and batched rows agree",)


def _version_spec(
    name: str, version: int, options: ModelOptions, engine: EngineSpec
) -> VersionSpec:
    return VersionSpec(
        model=name,
        version=version,
        inputs={tensor.name: tensor for tensor in options.inputs},
        outputs={tensor.name: tensor for tensor in options.outputs},
        batch_rows_max=options.batch_rows_max,
        positional_inputs=engine.positional_inputs,
        labels=options.labels,
    )


def _warm_up(engine: Engine, options: ModelOptions, spec: VersionSpec) -> None:
    """Run what the configuration asks for. Raises ModelFileError when a run fails."""
    for request in options.warmup:
        for _ in range(request.runs):
            try:
                engine.run(request.inputs, list(spec.outputs), {})
            except EngineError as error:
                raise ModelFileError(f"warm-up request '{request.name}' failed: {error}") from None


def _run_place(engine: Engine, options: ModelOptions, config: WorkerConfig) -> RunPlace:
    """On the loop only where runs are short and the model neither batches nor has instances that
    could run beside the loop. Trial runs say that, or else those of its callers."""
    waits = engine.spec.overlapped_runs > 0  # it would make the loop wait for a device
    if waits or options.batch_rows_max or options.instances > 1:
        return RunPlace(on_loop=False)
    bound_ns = config.inline_run_us_max * 1000
    return RunPlace(
        on_loop=_is_small(engine.spec) and _has_short_trials(engine, bound_ns),
        learns=engine.spec.sized_by_shapes,
        run_ns_max=bound_ns,
        overrun_ns_max=config.inline_overrun_us_max * 1000,
    )


def _has_short_trials(engine: Engine, bound_ns: int) -> bool:
    inputs = seeded_inputs([t for t in engine.spec.inputs if not t.optional], rows=1)
    if inputs is None:
        return False
    try:
        return any(_slowest_but_one_ns(engine, inputs) <= bound_ns for _ in range(TRIAL_ROUNDS))
    except EngineError:  # random values need not make sense to a model
        return False


def _slowest_but_one_ns(engine: Engine, inputs: Mapping[str, Array]) -> int:
    """The 99th percentile of a round of trial runs; above any bound where they take too long."""
    wanted = [tensor.name for tensor in engine.spec.outputs]
    times_ns: list[int] = []
    for _ in range(TRIAL_RUNS):
        started_ns = time.thread_time_ns()
        engine.run(inputs, wanted, {})
        times_ns.append(time.thread_time_ns() - started_ns)
        if sum(times_ns) > TRIAL_BUDGET_NS_MAX:
            return TRIAL_BUDGET_NS_MAX
    return sorted(times_ns)[-2]


def _is_small(spec: EngineSpec) -> bool:
    """Few elements, none of which decides how much there is to do: a trial run then says how long
    all runs take. An input that is not read by position may be a size, or a loop's count."""
    for tensor in spec.inputs:
        elements = 1
        for dim in tensor.shape:
            elements *= max(dim, 1)
        if elements > TRIAL_ELEMENTS_MAX or tensor.name not in spec.positional_inputs:
            return False
    return True
