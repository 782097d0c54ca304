# SPDX-License-Identifier: Apache-2.0
"""What to build, from what the owner wants and what the host is."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from thirdrail_engines import amounts, positions
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.cpu_target import cpu_target, native_target
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Precision,
    Profile,
)

_TORCHSCRIPT = ".pt"
# Of our own conversion, in precision/. Raised when it decides differently: a plan that was made by
# other rules is then another plan.
_CONVERSION_RULES = 1
# Of how AOTInductor's code is compiled. 2: to libraries that can be unloaded.
_NATIVE_CODE_RULES = 2


def onnxruntime_version() -> str:
    import onnxruntime

    version: str = onnxruntime.__version__
    return version


def tensorrt_version(builder: Builder) -> str:
    """Of the package for this builder. Raises BuildError MISSING with the line that installs it."""
    from thirdrail_engines.tensorrt import installed_builders
    from thirdrail_engines.tensorrt.api import load_api

    return dict(installed_builders()).get(builder) or load_api(builder).version


def torch_version() -> str:
    """Without importing it. Raises BuildError MISSING with the line that installs it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise BuildError(
            BuildFault.MISSING, "torch is not installed: pip install 'thirdrail[torch]'"
        ) from None


def onnxruntime_request(
    path: Path, wanted: CompileOptions, *, precision: Precision, threads_max: int
) -> PlanRequest:
    """A plan for this CPU. It takes all shapes: profiles only tell a TorchScript file's inputs."""
    profiles = wanted.profiles if path.suffix == _TORCHSCRIPT else ()
    return PlanRequest(
        source=path,
        builder=Builder.ONNXRUNTIME,
        builder_version=onnxruntime_version(),
        precision=precision,
        converter=_converter(precision),
        rules=f"positions {positions.RULES}, amounts {amounts.RULES}",
        profiles=tuple(Profile(inputs) for inputs in profiles),
        target=cpu_target(),
        threads_max=threads_max,
    )


def aot_inductor_request(
    path: Path, wanted: CompileOptions, device: DeviceFacts | None, *, threads_max: int
) -> PlanRequest:
    """A plan for this CPU, or for the GPU at hand; it takes the shapes that the program does.

    Which C++ compiler made it is no part of it: where a plan is loaded, there need not be one.
    Raises BuildError: MISSING without PyTorch, REFUSED for another precision than the program's.
    """
    if wanted.precision is not Precision.AS_IS:
        raise BuildError(
            BuildFault.REFUSED,
            f"{path.name}: PyTorch compiles a program in the precision in which it was exported, "
            f"and precision is {wanted.precision}: export it in that, and leave precision out",
        )
    return PlanRequest(
        source=path,
        builder=Builder.AOT_INDUCTOR,
        builder_version=torch_version(),
        compute_capabilities=(device.capability_name,) if device else (),
        target=f"{native_target()}, {_gpu(device)}" if device else native_target(),
        rules=f"native code {_NATIVE_CODE_RULES}",
        threads_max=threads_max,
    )


def tensorrt_request(
    path: Path,
    builder: Builder,
    version: str,
    wanted: CompileOptions,
    profiles: Sequence[Profile],
    capabilities: Sequence[str],
    device: DeviceFacts | None,
) -> PlanRequest:
    """A plan for GPUs by their compute capability, or for the one at hand.

    TensorRT for RTX builds for a capability, so that plans which were built ahead of time on
    another machine have the key that is asked for here. TensorRT times kernels on the GPU itself:
    its plans belong to that model of GPU and to the driver.
    device: the one at hand; None where capabilities are named for a builder that takes them.
    Raises BuildError REFUSED for a capability that the builder does not build for.
    """
    from thirdrail_engines.tensorrt import check_capabilities

    names = check_capabilities(builder, capabilities)
    if not names and device and builder is Builder.TENSORRT_RTX:
        names = (device.capability_name,)
    return PlanRequest(
        source=path,
        builder=builder,
        builder_version=version,
        precision=wanted.precision,
        converter=_converter(wanted.precision),
        profiles=tuple(profiles),
        compute_capabilities=names,
        target=_gpu(device) if device and builder is Builder.TENSORRT else "",
        workspace_bytes=wanted.workspace_bytes,
        optimization_level=wanted.optimization_level,
        is_version_compatible=wanted.is_version_compatible,
        is_refittable=wanted.is_refittable,
        plugins=tuple(path.parent / plugin for plugin in wanted.plugins),
        uses_timing_cache=wanted.uses_timing_cache,
    )


def _converter(precision: Precision) -> str:
    """ONNX Runtime's converter decides what stays in FP32, and we."""
    if precision is Precision.AS_IS:
        return ""
    return f"rules {_CONVERSION_RULES}, onnxruntime {onnxruntime_version()}"


def driver_text(device: DeviceFacts) -> str:
    return ".".join(map(str, device.driver))


def _gpu(device: DeviceFacts) -> str:
    return f"{device.name} {device.capability_name} CUDA {driver_text(device)}"
