# SPDX-License-Identifier: Apache-2.0
"""Plans that are built before anybody loads them, for machines that only mount the cache.

A machine with a GPU asks for the plan of its own compute capability. So one plan is built for each,
and has the very key that will be asked for there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.one_engine import EngineLoader
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plan_cache import Manifest
from thirdrail_engines.plans import Builder


@dataclass(frozen=True, slots=True)
class PlanAhead:
    """capability: "sm86"; "" for a plan for this CPU, or for the GPU at hand."""

    capability: str
    key: str
    is_cache_hit: bool
    manifest: Manifest


def compile_ahead(
    path: Path,
    builder: Builder,
    capabilities: Sequence[str],
    *,
    options: EngineOptions,
    compile: CompileOptions,  # noqa: A002
    services: CompileServices,
) -> Iterator[PlanAhead]:
    """Build what is not in the cache, one after the other, and tell of each.

    capabilities: as in the option of that name; none: for what is at hand. Where the model's own
    options name capabilities, every machine asks for one plan for all of them, and that is built.
    Raises BuildError, ProfileError, and ModelFileError for a model that cannot be read.
    """
    targets = () if compile.compute_capabilities else tuple(capabilities)
    with (
        Inspector() as inspector,
        EngineLoader(path, options, inspector, compile, services) as loader,
    ):
        for target in targets or ("",):
            plan, is_hit = compile_plan(loader.request(builder, target), services)
            if services.cache is not None:
                services.cache.release(plan.key)
            yield PlanAhead(target, plan.key.digest, is_hit, plan.manifest)
