# SPDX-License-Identifier: Apache-2.0
"""Which plan a model shall have from a builder, for the GPU at hand or for a named capability.

TensorRT's plans depend on the shapes that the model's inputs leave open. The model itself tells
them, which takes a whole load of it; where its plan is in the cache, a manifest tells them too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from thirdrail.tensors import TensorSpec
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.cuda_engines import facts_for
from thirdrail_engines.engine import EngineSpec, ModelFileError
from thirdrail_engines.inputs_on_record import inputs_on_record
from thirdrail_engines.plan_cache import key_of
from thirdrail_engines.plan_requests import (
    aot_inductor_request,
    onnxruntime_request,
    tensorrt_request,
    tensorrt_version,
)
from thirdrail_engines.plans import Builder, PlanRequest, Precision
from thirdrail_engines.profiles import profiles_for


class WantedPlans:
    """Of one model. learn: loads it to tell its inputs."""

    def __init__(
        self,
        path: Path,
        threads_max: int,
        wanted: CompileOptions,
        services: CompileServices,
        learn: Callable[[], EngineSpec],
    ) -> None:
        self._path = path
        self._threads_max = threads_max
        self._wanted = wanted
        self._services = services
        self._learn = learn

    def of(self, builder: Builder, capability: str = "") -> PlanRequest:
        """capability: in place of the configured ones, and of the GPU at hand. Of AOTInductor, the
        plan is for the GPU at hand where one is given, else for this CPU.

        Raises BuildError (MISSING, REFUSED), and ProfileError; ModelFileError where the model
        cannot be read.
        """
        if builder is Builder.ONNXRUNTIME:
            return self.of_onnxruntime(self._wanted.precision)
        if builder is Builder.AOT_INDUCTOR:
            gpu = facts_for("torch", self._services) if capability else None
            return aot_inductor_request(
                self._path, self._wanted, gpu, threads_max=self._threads_max
            )
        names = (capability,) if capability else self._wanted.compute_capabilities
        is_named = builder is Builder.TENSORRT_RTX and names
        version = tensorrt_version(builder)
        device = None if is_named else facts_for(builder, self._services)
        found = self._on_record(builder, version, names, device)
        if found is not None:
            return found
        spec = self._learn()
        return self._of_tensorrt(builder, version, names, device, spec.inputs, spec.unranked)

    def of_onnxruntime(self, precision: Precision) -> PlanRequest:
        return onnxruntime_request(
            self._path, self._wanted, precision=precision, threads_max=self._threads_max
        )

    def _on_record(
        self, builder: Builder, version: str, names: Sequence[str], device: DeviceFacts | None
    ) -> PlanRequest | None:
        """For a plan that is in the cache."""
        cache = self._services.cache
        inputs = inputs_on_record(self._path, builder, cache)
        if cache is None or inputs is None:
            return None
        try:
            request = self._of_tensorrt(builder, version, names, device, inputs, frozenset())
            return request if cache.has(key_of(request, self._services.digest)) else None
        except ModelFileError:  # of which the model itself may know better
            return None

    def _of_tensorrt(
        self,
        builder: Builder,
        version: str,
        names: Sequence[str],
        device: DeviceFacts | None,
        inputs: Sequence[TensorSpec],
        unranked: frozenset[str],
    ) -> PlanRequest:
        profiles = profiles_for(inputs, self._wanted.profiles, self._wanted.rows, unranked)
        return tensorrt_request(self._path, builder, version, self._wanted, profiles, names, device)
