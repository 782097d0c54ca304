# SPDX-License-Identifier: Apache-2.0
"""One candidate becomes an engine: its plan is compiled and loaded, and it is proven.

ONNX Runtime on the CPU with the model as it is, or for a PyTorch source with the plan of its ONNX
form, is the reference of most proofs (proving.py). There it runs in a process of its own; here it
is only loaded to tell the model's inputs, or to serve.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from thirdrail_engines import cuda_engines
from thirdrail_engines.compile_options import CompileOptions, EngineChoice
from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.cuda_engines import facts_for
from thirdrail_engines.engine import Engine
from thirdrail_engines.engine_choice import TORCH_SUFFIXES, Candidate, Device
from thirdrail_engines.engine_report import Attempt, EngineReport, LoadedEngine
from thirdrail_engines.expectations import Reference
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.onnxruntime_engine import load_onnx, load_plan
from thirdrail_engines.onnxruntime_session import CUDA_PROVIDERS
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plan_cache import Plan
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Precision,
    Profile,
)
from thirdrail_engines.profiles import ProfileError, profiles_for
from thirdrail_engines.proving import Prover, reference_of
from thirdrail_engines.reference_proof import ReferenceProof
from thirdrail_engines.trials import value_fault
from thirdrail_engines.wanted_plans import WantedPlans


class EngineLoader:
    """Loads one model, by one engine or another. For one thread; closed after the load."""

    def __init__(
        self,
        path: Path,
        options: EngineOptions,
        inspector: Inspector,
        wanted: CompileOptions,
        services: CompileServices | None,
    ) -> None:
        self.path = path
        self._options = options
        self._inspector = inspector
        self._wanted = wanted
        self._services = services or CompileServices()
        self._plans = WantedPlans(
            path, options.threads_max, wanted, self._services, lambda: self._need_reference().spec
        )
        self._prover = Prover(
            path, options.threads_max, wanted, self._services, self._reference_plan
        )
        self._reference: Engine | None = None

    def load(self, candidate: Candidate, attempts: tuple[Attempt, ...]) -> LoadedEngine:
        """attempts: what failed before; it goes into the report.

        Raises ModelFileError: BuildError, ProofError and ProfileError among others.
        """
        self._check_cancelled()
        if candidate.device is Device.CUDA:
            facts_for(candidate.engine, self._services)  # before anything is built for it
        if candidate.reads_model:
            engine = self._take_reference()
            return LoadedEngine(engine, EngineReport(candidate.name, attempts))
        if candidate.builder is None:
            return self._load_model_file(candidate, attempts)
        return self._load_plan(candidate, candidate.builder, attempts)

    def close(self) -> None:
        if self._reference is not None:
            self._reference.close()
            self._reference = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_cancelled(self) -> None:
        if self._services.cancelled.is_set():
            raise BuildError(BuildFault.CANCELLED, f"the load of {self.path.name} was cancelled")

    # The reference

    def _need_reference(self) -> Engine:
        if self._reference is None:
            self._reference = self._open_reference()
        return self._reference

    def _take_reference(self) -> Engine:
        """For good: it is not closed here."""
        engine = self._need_reference()
        self._profiles(engine)  # a mistake in the configuration is one on every engine
        self._reference = None
        return engine

    def _open_reference(self) -> Engine:
        plan = self._reference_plan()
        if plan is None:
            return load_onnx(self.path, options=self._options, inspector=self._inspector)
        return load_plan(plan, self.path, options=self._options)

    def _reference_plan(self) -> memoryview | None:
        """For a source that ONNX Runtime does not read."""
        if not self._is_torch:
            return None
        plan, _ = compile_plan(self._plans.of_onnxruntime(Precision.AS_IS), self._services)
        self._release(plan)  # its bytes are ours
        return plan.data

    @property
    def _is_torch(self) -> bool:
        return self.path.suffix in TORCH_SUFFIXES

    def _profiles(self, engine: Engine) -> tuple[Profile, ...]:
        """Those that were given; without any, those that can be derived, or none."""
        spec, wanted = engine.spec, self._wanted
        inputs = {tensor.name: tensor for tensor in spec.inputs}
        for name, values in wanted.proof_values.items():
            if name not in inputs:
                names = ", ".join(map(repr, inputs))
                raise ProfileError(f"proof.{name}: the model has no such input, only {names}")
            if fault := value_fault(inputs[name], values):
                raise ProfileError(f"proof.{name}: {fault}")
        try:
            return profiles_for(spec.inputs, wanted.profiles, wanted.rows, spec.unranked)
        except BuildError:
            return ()

    # Plans

    def _load_plan(
        self, candidate: Candidate, builder: Builder, attempts: tuple[Attempt, ...]
    ) -> LoadedEngine:
        request = self.request(builder, self._capability(candidate))
        plan, is_hit = compile_plan(request, self._services)
        try:
            self._check_cancelled()
            self._services.tell("loading the engine", 0, 0)
            engine = self._open_plan(plan, request, candidate.device)
            with _closing_on_error(engine):
                proof = self._proof_of_plan(candidate, engine, plan, request)
        finally:
            # The engine has what it needs: the plan may go when the cache needs room for others.
            self._release(plan)
        report = EngineReport(
            candidate.name,
            attempts,
            precision=request.precision,
            plan_key=plan.key.digest,
            is_cache_hit=is_hit,
            build_s=plan.manifest.build_s,
            proof=proof,
        )
        return LoadedEngine(engine, report)

    def request(self, builder: Builder, capability: str = "") -> PlanRequest:
        """See WantedPlans.of."""
        return self._plans.of(builder, capability)

    def _capability(self, candidate: Candidate) -> str:
        """See `request`: only AOTInductor has to be told that it is a GPU."""
        is_told = candidate.builder is Builder.AOT_INDUCTOR and candidate.device is Device.CUDA
        return facts_for(candidate.engine, self._services).capability_name if is_told else ""

    def _open_plan(self, plan: Plan, request: PlanRequest, device: Device) -> Engine:
        if request.builder is Builder.ONNXRUNTIME:
            return load_plan(plan.data, self.path, options=self._options)
        if request.builder is Builder.AOT_INDUCTOR:
            from thirdrail_engines.torch_package import load_package

            return load_package(
                plan.data, self.path.name, options=self._options, device=device.value
            )
        return cuda_engines.open_plan(plan, request, self._services, self._options.instances)

    def _release(self, plan: Plan) -> None:
        if self._services.cache is not None:
            self._services.cache.release(plan.key)

    # Engines that read the model file

    def _load_model_file(self, candidate: Candidate, attempts: tuple[Attempt, ...]) -> LoadedEngine:
        engine = self._open_model_file(candidate)
        proof = None
        # PyTorch on the CPU runs the program as it was exported, as the reference does.
        if candidate.device is Device.CUDA:
            with _closing_on_error(engine):
                profiles = self._profiles(engine)
                self._prepare_proof()
                proof = self._prover.prove_file(candidate, engine, profiles)
        return LoadedEngine(engine, EngineReport(candidate.name, attempts, proof=proof))

    def _open_model_file(self, candidate: Candidate) -> Engine:
        if candidate.engine is EngineChoice.ONNXRUNTIME:
            return load_onnx(
                self.path,
                options=self._options,
                inspector=self._inspector,
                providers=CUDA_PROVIDERS,
            )
        if candidate.engine is not EngineChoice.TORCH or not self._is_torch:
            raise BuildError(
                BuildFault.MISSING, f"the {candidate.engine} engine does not run {self.path.name}"
            )
        return self._open_torch(candidate.device)

    def _open_torch(self, device: Device) -> Engine:
        try:
            from thirdrail_engines.torch_engine import load_torch
        except ImportError as error:
            raise BuildError(
                BuildFault.MISSING, f"{error.name} is not installed: pip install 'thirdrail[torch]'"
            ) from None
        return load_torch(self.path, options=self._options, device=device.value)

    # Proofs

    def _proof_of_plan(
        self, candidate: Candidate, engine: Engine, plan: Plan, request: PlanRequest
    ) -> ReferenceProof | None:
        """None for the plan that is the reference itself. Raises ProofError."""
        is_reference = self._is_torch and request == self._plans.of_onnxruntime(Precision.AS_IS)
        if is_reference and reference_of(candidate, self._wanted) is Reference.ONNXRUNTIME:
            return None
        profiles = request.profiles or self._profiles(engine)
        self._prepare_proof()
        return self._prover.prove_plan(candidate, engine, plan, request, profiles)

    def _prepare_proof(self) -> None:
        self.close()  # what told the shapes has done so
        self._check_cancelled()


@contextmanager
def _closing_on_error(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.close()
        raise
