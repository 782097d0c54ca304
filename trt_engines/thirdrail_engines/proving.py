# SPDX-License-Identifier: Apache-2.0
"""One model's engines are proven: against which reference, and on which record.

ONNX Runtime is the reference for what others make of an ONNX form. What PyTorch runs is compared
with the program itself, operator by operator: it needs no ONNX form, which a program may not have,
and which takes other sizes than the program does. The configuration may say otherwise.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from thirdrail_engines.compile_options import CompileOptions, EngineChoice
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.engine import Engine, ModelFileError
from thirdrail_engines.engine_choice import Candidate
from thirdrail_engines.expectations import Reference, ReferenceRequest
from thirdrail_engines.plan_cache import Plan
from thirdrail_engines.plans import PlanRequest, Precision, Profile
from thirdrail_engines.proof_apart import prove_apart
from thirdrail_engines.proof_records import recorded_proof, runs_on
from thirdrail_engines.reference_proof import ReferenceProof, Tolerance, tolerance_for


class ProofError(ModelFileError):
    """The engine does not compute what its model says, or that could not be shown."""

    def __init__(self, name: str, proof: ReferenceProof) -> None:
        super().__init__(f"{name} is not proven: {'; '.join(proof.faults)}")
        self.proof = proof


def reference_of(candidate: Candidate, wanted: CompileOptions) -> Reference:
    if wanted.proof_reference is not None:
        return wanted.proof_reference
    return Reference.TORCH if candidate.engine is EngineChoice.TORCH else Reference.ONNXRUNTIME


class Prover:
    """Of one model. onnx_plan: what ONNX Runtime is to run in place of the model file, if so."""

    def __init__(
        self,
        path: Path,
        threads_max: int,
        wanted: CompileOptions,
        services: CompileServices,
        onnx_plan: Callable[[], memoryview | None],
    ) -> None:
        self._path = path
        self._threads_max = threads_max
        self._wanted = wanted
        self._services = services
        self._onnx_plan = onnx_plan

    def prove_plan(
        self,
        candidate: Candidate,
        engine: Engine,
        plan: Plan,
        request: PlanRequest,
        profiles: Sequence[Profile],
    ) -> ReferenceProof:
        """The proof on record, or a new one. engine: runs the plan of this request.

        Raises ProofError; BuildError and ModelFileError where there is nothing to compare with.
        """
        reference = reference_of(candidate, self._wanted)
        proof = recorded_proof(
            plan,
            runs_on(request, reference, self._services),
            profiles,
            self._wanted.proof_values,
            self._tolerance(engine, request.precision),
            self._services.cache,
            lambda: self._prove(engine, reference, request.precision, profiles),
        )
        return _accepted(candidate, proof)

    def prove_file(
        self, candidate: Candidate, engine: Engine, profiles: Sequence[Profile]
    ) -> ReferenceProof:
        """Of an engine that reads the model file. Raises as `prove_plan` does."""
        reference = reference_of(candidate, self._wanted)
        return _accepted(candidate, self._prove(engine, reference, Precision.AS_IS, profiles))

    def _prove(
        self,
        engine: Engine,
        reference: Reference,
        precision: Precision,
        profiles: Sequence[Profile],
    ) -> ReferenceProof:
        request = ReferenceRequest(
            self._path,
            None,
            tuple(profiles),
            self._wanted.proof_values,
            threads_max=self._threads_max,
        )
        plan = self._onnx_plan() if reference is Reference.ONNXRUNTIME else None
        self._services.tell("proving the engine", 0, 0)
        tolerance = self._tolerance(engine, precision)
        proof = prove_apart(engine, request, plan, tolerance, self._services)
        return dataclasses.replace(proof, reference=reference)

    def _tolerance(self, engine: Engine, precision: Precision) -> Tolerance:
        return tolerance_for(precision, engine.spec, self._wanted.tolerance)


def _accepted(candidate: Candidate, proof: ReferenceProof) -> ReferenceProof:
    if not proof.is_proven:
        raise ProofError(candidate.name, proof)
    return proof
