# SPDX-License-Identifier: Apache-2.0
"""Proofs are remembered beside their plan: one per device, driver and runtime that it ran on.

A record holds figures; whether they suffice is judged anew each time, by the tolerances of today.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.cuda_engines import facts_for
from thirdrail_engines.expectations import Reference
from thirdrail_engines.plan_cache import Plan, PlanCache
from thirdrail_engines.plan_requests import driver_text, onnxruntime_version, torch_version
from thirdrail_engines.plans import Builder, PlanRequest, Profile
from thirdrail_engines.profiles import write_shape_range
from thirdrail_engines.reference_proof import PROOF_FORMAT, ReferenceProof, Tolerance
from thirdrail_engines.trials import ValueRange


@dataclass(frozen=True, slots=True)
class RunsOn:
    """What the outcome of a run may depend on besides the plan. reference: its runtime."""

    device: str
    driver: str
    runtime: str
    reference: str


def runs_on(request: PlanRequest, reference: Reference, services: CompileServices) -> RunsOn:
    """For the plan of this request. Raises BuildError for a device or package that is not here."""
    compared = _reference_text(reference)
    if request.builder is Builder.ONNXRUNTIME:
        return RunsOn(request.target, "", _reference_text(Reference.ONNXRUNTIME), compared)
    if request.builder is Builder.AOT_INDUCTOR:
        return RunsOn(request.target, "", _reference_text(Reference.TORCH), compared)
    device = facts_for(request.builder, services)
    runtime = f"{request.builder} {request.builder_version}"
    return RunsOn(device.uuid, driver_text(device), runtime, compared)


def _reference_text(reference: Reference) -> str:
    version = torch_version() if reference is Reference.TORCH else onnxruntime_version()
    return f"{reference} {version}"


def recorded_proof(
    plan: Plan,
    where: RunsOn,
    profiles: Sequence[Profile],
    values: Mapping[str, ValueRange],
    tolerance: Tolerance,
    cache: PlanCache | None,
    prove: Callable[[], ReferenceProof],
) -> ReferenceProof:
    """The proof that is on record, else a new one, which is then. Judged by `tolerance`.

    A run that the engine failed is not recorded: memory may have been short for a moment.
    """
    name = _record_name(where, profiles, values)
    known = _read(cache.notes(plan, name)) if cache else None
    if known is not None:
        return known.judged(tolerance)
    proof = prove()
    if cache is not None and not proof.failed:
        cache.note(plan, name, json.dumps(proof.to_dict(), indent=2).encode())
    return proof.judged(tolerance)


def _record_name(
    where: RunsOn, profiles: Sequence[Profile], values: Mapping[str, ValueRange]
) -> str:
    circumstances = {
        "format": PROOF_FORMAT,
        "device": where.device,
        "driver": where.driver,
        "runtime": where.runtime,
        "reference": where.reference,
        "profiles": [
            {name: write_shape_range(shapes) for name, shapes in profile.inputs.items()}
            for profile in profiles
        ],
        "values": {name: [each.lowest, each.highest] for name, each in values.items()},
    }
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
    return f"proof-{digest[:32]}.json"


def _read(record: bytes | None) -> ReferenceProof | None:
    """None for a record that is not there, or that was not written by this version."""
    if record is None:
        return None
    try:
        return ReferenceProof.from_dict(json.loads(record))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
