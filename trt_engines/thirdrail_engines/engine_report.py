# SPDX-License-Identifier: Apache-2.0
"""What a load says about the engine that it chose: which, why, from which plan, how well proven."""

from dataclasses import dataclass
from typing import Any

from thirdrail_engines.engine import Engine
from thirdrail_engines.plans import Precision
from thirdrail_engines.reference_proof import ReferenceProof


@dataclass(frozen=True, slots=True)
class Attempt:
    """An engine that was to run the model and does not."""

    engine: str  # as EngineReport names it
    fault: str  # one word or two: a BuildFault, "not proven", "not loadable", "compiling"
    reason: str  # for people


@dataclass(frozen=True, slots=True)
class EngineReport:
    """engine: "onnxruntime", "tensorrt_rtx", ..., with " on cuda" where it runs on a GPU."""

    engine: str
    attempts: tuple[Attempt, ...] = ()  # in the order of choice; none: this is the first choice
    precision: Precision = Precision.AS_IS  # that the model was converted to
    plan_key: str = ""  # "": no plan, the engine reads the model file
    is_cache_hit: bool = False
    build_s: float = 0.0  # of the plan, whenever it was built
    proof: ReferenceProof | None = None  # None: the engine is the reference itself

    @property
    def why_not_first(self) -> str:
        """Why the first choice does not run the model; "" where it does."""
        if not self.attempts:
            return ""
        first = self.attempts[0]
        return f"{first.engine}: {first.fault}: {first.reason}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "engine": self.engine,
            "why_not_first": self.why_not_first,
            "attempts": [
                {"engine": a.engine, "fault": a.fault, "reason": a.reason} for a in self.attempts
            ],
            "precision": self.precision.value,
            "plan_key": self.plan_key,
            "is_cache_hit": self.is_cache_hit,
            "build_s": self.build_s,
            "proof": self.proof.to_dict() if self.proof else None,
        }


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """Whoever holds it closes the engine."""

    engine: Engine
    report: EngineReport
