# SPDX-License-Identifier: Apache-2.0
"""What comes of a build."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thirdrail_engines.plans import Shape


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """An input or output of a plan. shape: -1 for an open dimension. dtype: its name in ours."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool


@dataclass(frozen=True, slots=True)
class Built:
    """What a builder returns, in the process that builds.

    plan: a file in the folder that the builder was given.
    layers: how many of each kind the plan has; source_layers: and the graph that it came from.
    """

    plan: Path
    layers: Mapping[str, int] = field(default_factory=dict)
    source_layers: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[PlanTensor, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """What `run_build` returns: a Built, and what was seen of the process that made it.

    conversion: the report of the precision conversion, as its module words it; None without one.
    peak_memory_bytes: the most that the process and its children held at once, without files that
        they had mapped.
    warnings: the builder's, and what could not be kept from the build (the network, for one).
    """

    plan: Path
    layers: Mapping[str, int]
    source_layers: Mapping[str, int]
    tensors: tuple[PlanTensor, ...]
    conversion: Mapping[str, object] | None
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
