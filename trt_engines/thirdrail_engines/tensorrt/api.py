# SPDX-License-Identifier: Apache-2.0
"""The two packages that offer TensorRT's API, and everything in which they differ.

`tensorrt` (10.0 and later) builds for the GPU at hand and times its kernels there. `tensorrt_rtx`
(TensorRT for RTX) builds for compute capabilities by name, without a GPU, and compiles the last
part when the plan is run. All other modules use what both have: `OPTIONAL` is the rest.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from typing import SupportsInt

from thirdrail_engines.plans import Builder, BuildError, BuildFault
from thirdrail_engines.tensorrt import native as t

# What only some versions have. Used in this module alone, and only after a look.
OPTIONAL = frozenset(
    {
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "EngineInvalidityDiagnostics",
        "Runtime.get_engine_validity",
        "CudaGraphStrategy",
        "CudaGraphStrategy.DISABLED",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "DynamicShapesKernelSpecializationStrategy.NONE",
        "ICudaEngine.create_runtime_config",
        "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeCache.deserialize",
        "IRuntimeCache.serialize",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "IRuntimeConfig.set_runtime_cache",
    }
)

CURRENT = "current"  # the compute capability of the GPU at hand

_TENSORRT_MAJOR_MIN = 10


@dataclass(frozen=True, slots=True)
class _Package:
    title: str
    module: str
    distributions: tuple[str, ...]  # that may have brought it, the usual one first
    install: str


_PACKAGES = {
    Builder.TENSORRT: _Package(
        "TensorRT",
        "tensorrt",
        ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        "pip install tensorrt",
    ),
    Builder.TENSORRT_RTX: _Package(
        "TensorRT for RTX",
        "tensorrt_rtx",
        ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
        "pip install 'thirdrail[tensorrt]'",
    ),
}


@dataclass(frozen=True, slots=True)
class Api:
    """One of the packages, imported."""

    builder: Builder
    trt: t.Module
    version: str  # as installed_builders() has it

    @property
    def title(self) -> str:
        return f"{title_of(self.builder)} {self.version}"

    def capability_names(self) -> tuple[str, ...]:
        """What plans can be built for by name, in the package's order, with "current"."""
        if not hasattr(self.trt, "ComputeCapability"):
            return (CURRENT,)
        members: dict[str, object] = self.trt.ComputeCapability.__members__
        return tuple(name.lower() for name in members if name != "NONE")

    def set_targets(self, config: t.IBuilderConfig, names: Sequence[str]) -> None:
        """names: checked by `check_capabilities`; none: the GPU at hand."""
        if not hasattr(config, "set_compute_capability"):
            return  # it knows no other target than the GPU at hand
        wanted = names or (CURRENT,)
        config.num_compute_capabilities = len(wanted)
        for index, name in enumerate(wanted):
            capability: t.ComputeCapability = getattr(self.trt.ComputeCapability, name.upper())
            is_set: bool = config.set_compute_capability(capability, index)
            if not is_set:
                text = f"{self.title} does not take {name} as a target"
                raise BuildError(BuildFault.REFUSED, text)

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT for RTX times nothing; it has the functions, and warns that they do nothing."""
        return self.builder is Builder.TENSORRT

    def engine_validity(self, plan: bytes, logger: t.ILogger) -> tuple[str, ...]:
        """What the package finds wrong with a plan without loading it; () also where it has no
        such test. Without a GPU it is silent about everything but the plan's form."""
        if not hasattr(self.trt.Runtime, "get_engine_validity"):
            return ()
        runtime: t.Runtime = self.trt.Runtime(logger)
        verdict: tuple[object, int] = runtime.get_engine_validity(plan)
        members: dict[str, SupportsInt] = self.trt.EngineInvalidityDiagnostics.__members__
        return tuple(name for name, bit in members.items() if int(bit) & verdict[1])

    @property
    def prepares_at_run_time(self) -> bool:
        """Whether a plan's kernels are finished when it is loaded, by choices that are ours."""
        return hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")

    def runtime_config(
        self, engine: t.ICudaEngine, *, is_eager: bool, records_graphs: bool
    ) -> t.IRuntimeConfig:
        """For what prepares at run time. It never prepares lazily: that would be on a request."""
        config: t.IRuntimeConfig = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if is_eager
            else self.trt.DynamicShapesKernelSpecializationStrategy.NONE
        )
        config.cuda_graph_strategy = (
            self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if records_graphs
            else self.trt.CudaGraphStrategy.DISABLED
        )
        return config

    def add_runtime_cache(self, config: t.IRuntimeConfig, data: bytes | None) -> t.IRuntimeCache:
        """Have contexts made with `config` use and fill a cache of finished kernels.

        data: of an earlier one. The package itself refuses what another version, GPU or driver
        made; then the cache is as if new.
        """
        cache: t.IRuntimeCache = config.create_runtime_cache()
        if data:
            cache.deserialize(data)
        config.set_runtime_cache(cache)
        return cache

    def runtime_cache_bytes(self, cache: t.IRuntimeCache) -> bytes:
        memory: t.IHostMemory = cache.serialize()
        return bytes(memory)

    @property
    def can_share_memory(self) -> bool:
        """Whether contexts compute in memory that we give them, of a size that the engine tells.
        10.0 has older names for it, which later versions have not."""
        has_size = hasattr(self.trt.ICudaEngine, "device_memory_size_v2")
        return has_size and hasattr(self.trt.IExecutionContext, "set_device_memory")

    def memory_size(self, engine: t.ICudaEngine) -> int:
        """In bytes, for any profile. 0 is for a model that needs none."""
        nbytes: int = engine.device_memory_size_v2
        return nbytes

    def new_context(
        self, engine: t.ICudaEngine, config: t.IRuntimeConfig | None, *, shares_memory: bool
    ) -> t.IExecutionContext | None:
        """None: it failed, and the log says why."""
        strategies = self.trt.ExecutionContextAllocationStrategy
        strategy = strategies.USER_MANAGED if shares_memory else strategies.STATIC
        context: t.IExecutionContext | None
        if config is None:
            context = engine.create_execution_context(strategy)
        else:
            config.set_execution_context_allocation_strategy(strategy)
            context = engine.create_execution_context(config)
        return context

    def use_memory(self, context: t.IExecutionContext, address: int, nbytes: int) -> None:
        """For what is enqueued next, until the device is done with it."""
        context.set_device_memory(address, nbytes)

    def can_capture(self, context: t.IExecutionContext, stream: int) -> bool:
        """True where the package cannot say: then the attempt shows."""
        if not hasattr(context, "is_stream_capturable"):
            return True
        is_capturable: bool = context.is_stream_capturable(stream)
        return is_capturable


def installed_builders() -> tuple[tuple[Builder, str], ...]:
    """Those of the two packages that are here, and their versions. Imports neither."""
    found = ((builder, _version(package)) for builder, package in _PACKAGES.items())
    return tuple((builder, version) for builder, version in found if version is not None)


def capability_names(builder: Builder) -> tuple[str, ...]:
    """The compute capabilities that `builder` makes plans for. Raises BuildError MISSING."""
    return load_api(builder).capability_names()


def title_of(builder: Builder) -> str:
    return _PACKAGES[builder].title


def load_api(builder: Builder) -> Api:
    """Import the package. Raises BuildError MISSING with the line that installs it."""
    package = _PACKAGES[builder]
    version = _version(package)
    if version is None:
        raise BuildError(
            BuildFault.MISSING, f"{package.title} is not installed. Run: {package.install}"
        )
    if builder is Builder.TENSORRT and int(version.split(".")[0]) < _TENSORRT_MAJOR_MIN:
        raise BuildError(
            BuildFault.MISSING,
            f"TensorRT {version} is installed, {_TENSORRT_MAJOR_MIN}.0 or newer is needed. "
            f"Run: {package.install} --upgrade",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own module, for others
            module: t.Module = importlib.import_module(package.module)
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be opened
        raise BuildError(
            BuildFault.MISSING,
            f"{package.title} {version} is installed and cannot be imported: {error}",
        ) from None
    return Api(builder, module, version)


def _version(package: _Package) -> str | None:
    if util.find_spec(package.module) is None:
        return None
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
