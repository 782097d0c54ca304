# SPDX-License-Identifier: Apache-2.0
"""`thirdrail compile`: fills a plan cache ahead of time. No server runs, and no GPU is needed."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from thirdrail.cli import EXIT_REFUSED
from thirdrail.cli.bars import PhaseBar, progress_on
from thirdrail.cli.session import (
    console,
    new_table,
    print_json,
    print_notes,
    print_whole,
    session_of,
    typed_by_hand,
)
from thirdrail.errors import FailedPrecondition
from thirdrail_engines import EngineOptions
from thirdrail_engines.ahead import PlanAhead, compile_ahead
from thirdrail_engines.builds import BuildLimits
from thirdrail_engines.compile_options import EngineChoice
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.plan_cache import CacheFolderError, PlanCache, PlanKey, default_folder
from thirdrail_engines.plan_cache.opening import reason_of
from thirdrail_engines.plans import BuildError, BuildFault, Precision
from thirdrail_server.compile_jobs import Job, Wish, jobs_at, read_profiles
from thirdrail_server.config import GIB, CompileConfig, ConfigError, bytes_of_gib
from thirdrail_server.repository.errors import RepositoryError

MIB = 1 << 20
_NICENESS = 0  # nobody is served by this process, so its builds are its work
_DEFAULTS = CompileConfig()
_FOR_THIS_CPU = {EngineChoice.ONNXRUNTIME: "ONNX Runtime", EngineChoice.TORCH: "PyTorch"}
_NUMBERS = ("VERSION", "SECONDS", "MIB")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one model version for one target."""

    model: str
    version: int  # 0: none is known
    target: str
    builder: str
    result: str  # "built", "cached" or "failed"
    plan_key: str = ""
    build_s: float = 0.0  # of the plan, whenever it was built
    plan_bytes: int = 0
    reason: str = ""  # why it failed

    @property
    def title(self) -> str:
        return f"{self.model} {self.version}" if self.version else self.model


def compile(  # noqa: A001 the command's name
    ctx: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_OR_REPO",
            help="A model file, the folder of one model, or a repository of models.",
        ),
    ],
    capabilities: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="SM,...",
            help="The GPUs by compute capability, for example sm86,sm89,sm120. A plan for each.",
        ),
    ] = "",
    engine: Annotated[
        EngineChoice,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help=f"Whose plans: {', '.join(EngineChoice)}. auto: as the model is configured, else "
            "TensorRT for RTX where GPUs are named, else ONNX Runtime for this CPU. torch: "
            "AOTInductor's for this CPU, which servers look for with torch_compile.",
        ),
    ] = EngineChoice.AUTO,
    precision: Annotated[
        Precision | None,
        typer.Option("--precision", help="In place of the one in the model's configuration."),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="INPUT=SHAPES",
            help="The smallest, best and largest shape of an input of a model file, as in "
            "profile.0.INPUT of config.pbtxt. Once for each input with an open dimension; an input "
            "that comes again belongs to a further profile.",
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="DIR",
            help="The cache to fill. \\[default: the one that servers use]",
        ),
    ] = None,
    cache_gib: Annotated[
        float, typer.Option("--cache-gib", metavar="GIB", min=0, help="Its size.")
    ] = _DEFAULTS.cache_bytes_max / GIB,
    derive_batching: Annotated[
        int,
        typer.Option(
            "--derive-batching",
            metavar="ROWS",
            min=0,
            help="As given to the servers, for models without a configuration.",
        ),
    ] = 0,
    build_minutes_max: Annotated[
        float,
        typer.Option(
            "--build-minutes-max", metavar="MINUTES", min=0.01, help="How long one build may take."
        ),
    ] = _DEFAULTS.build_s_max / 60,
    build_memory_gib: Annotated[
        float,
        typer.Option(
            "--build-memory-gib", metavar="GIB", min=0, help="Memory of one build. 0: no limit."
        ),
    ] = 0.0,
) -> None:
    """Compile models ahead of time, also for GPUs that are not here.

    \b
    thirdrail compile models/ --for sm86,sm89,sm120 --cache-dir plans/
    thirdrail serve models/ --read-only-cache plans/     # where the GPUs are
    thirdrail compile a.onnx --for sm89 --profile x=1x3x32,4x3x64,8x3x128

    Plans that are there already are left as they are. Exit code 1 when one could not be built or
    kept, and when there are no models.
    """
    asked = tuple(filter(None, map(str.strip, capabilities.split(","))))
    whose = _FOR_THIS_CPU.get(engine)
    if whose and asked:
        raise typer.BadParameter(
            f"{whose}'s plans are for this CPU; for GPUs name tensorrt_rtx or tensorrt",
            param_hint="--engine",
        )
    try:
        limits = BuildLimits(
            seconds_max=build_minutes_max * 60,
            memory_bytes_max=bytes_of_gib("--build-memory-gib", build_memory_gib),
            niceness=_NICENESS,
        )
        with typed_by_hand():
            profiles = read_profiles(profile or ())
            wish = Wish(asked, engine, precision, derive_batching, profiles)
            jobs = list(jobs_at(path, wish))
        cache_bytes_max = bytes_of_gib("--cache-gib", cache_gib)
        if not cache_bytes_max:
            raise ConfigError(f"--cache-gib must be above 0, got {cache_gib:g}")
        with PlanCache(cache_dir or _default_cache(), cache_bytes_max) as cache:
            outcomes = [_in_cache(each, cache) for each in list(_with_bars(jobs, cache, limits))]
    except (ConfigError, RepositoryError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except CacheFolderError as error:
        raise FailedPrecondition(str(error)) from None
    except OSError as error:
        raise FailedPrecondition(f"{error.filename or path}: {reason_of(error)}") from None
    if session_of(ctx).as_json:
        print_json([dataclasses.asdict(each) for each in outcomes])
    elif outcomes:
        print_whole(_table(outcomes))
        print_notes(
            (f"{each.title}, {targets}", each.reason) for each, targets in _failures(outcomes)
        )
    else:
        typer.echo(f"{path} holds no models: there is no NAME/VERSION/model.onnx in it.", err=True)
    if not outcomes or any(each.result == "failed" for each in outcomes):
        raise typer.Exit(EXIT_REFUSED)


def _default_cache() -> Path:
    try:
        return default_folder()
    except RuntimeError:
        raise ValueError("this user has no home folder: name a --cache-dir") from None


def _with_bars(jobs: list[Job], cache: PlanCache, limits: BuildLimits) -> Iterator[Outcome]:
    for warning in dict.fromkeys(f"{job.model}: {each}" for job in jobs for each in job.warnings):
        typer.echo(warning, err=True)
    building = nullcontext if cache.keeps_plans else _in_vain
    with progress_on(console(stderr=True)) as bars:
        for job in jobs:
            bar = PhaseBar(bars, job.model)
            outcomes = []
            services = CompileServices(cache, limits, bar.show, building=building)
            for outcome in _outcomes(job, services):
                outcomes.append(outcome)
                yield outcome
            bar.end(_summary(outcomes), failed=any(each.result == "failed" for each in outcomes))


def _in_vain() -> AbstractContextManager[None]:
    raise BuildError(BuildFault.OUT_OF_DISK, NOT_BUILT)


def _summary(outcomes: list[Outcome]) -> str:
    counts = Counter(each.result for each in outcomes)
    return ", ".join(f"{count} {result}" for result, count in counts.items())


def _outcomes(job: Job, services: CompileServices) -> Iterator[Outcome]:
    """One per target. What fails for one is no reason not to try the next."""
    if job.fault:
        yield from (_failed(job, target, job.fault) for target in job.targets)
        return
    left = list(job.targets)
    while left:
        try:
            for plan in compile_ahead(
                job.path,
                job.builder,
                left.copy(),
                options=EngineOptions(),
                compile=job.options,
                services=services,
            ):
                yield _done(job, left.pop(0), plan)
        except ModelFileError as error:
            yield _failed(job, left.pop(0), job.reason(error))


def _done(job: Job, target: str, plan: PlanAhead) -> Outcome:
    return Outcome(
        job.model,
        job.version,
        job.title(target),
        job.builder.value,
        "cached" if plan.is_cache_hit else "built",
        plan_key=plan.key,
        build_s=plan.manifest.build_s,
        plan_bytes=plan.manifest.plan_bytes,
    )


def _failed(job: Job, target: str, reason: str) -> Outcome:
    builder = job.builder.value
    return Outcome(job.model, job.version, job.title(target), builder, "failed", reason=reason)


def _in_cache(outcome: Outcome, cache: PlanCache) -> Outcome:
    """When all are built: what did not fit in, or made room for others, is as good as failed."""
    if outcome.result == "failed" or cache.has(PlanKey(outcome.plan_key, {})):
        return outcome
    return dataclasses.replace(outcome, result="failed", reason=NOT_KEPT)


NOT_KEPT = (
    "it was built and is not in the cache, which is too small (--cache-gib) or cannot be written to"
)
NOT_BUILT = "it is not in the cache, which cannot be written to, and was not built in vain"
_STYLES = {"built": "green", "cached": "green", "failed": "red"}


def _table(outcomes: list[Outcome]) -> Table:
    columns = ("MODEL", "VERSION", "TARGET", "BUILDER", "RESULT", "SECONDS", "MIB", "PLAN")
    table = new_table(*columns, right=_NUMBERS)
    for each in outcomes:
        is_there = each.result != "failed"
        table.add_row(
            escape(each.model),
            str(each.version or "-"),
            escape(each.target),
            each.builder,
            f"[{_STYLES[each.result]}]{each.result}[/]",
            f"{each.build_s:.1f}" if is_there else "-",
            f"{each.plan_bytes / MIB:.1f}" if is_there else "-",
            each.plan_key[:12] if is_there else "-",
        )
    return table


def _failures(outcomes: list[Outcome]) -> Iterator[tuple[Outcome, str]]:
    """What fails for several targets for the same reason is said once."""
    for _, group in groupby(outcomes, lambda each: (each.model, each.version, each.reason)):
        alike = list(group)
        if alike[0].result == "failed":
            yield alike[0], ",".join(each.target for each in alike)
