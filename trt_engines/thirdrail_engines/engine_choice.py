# SPDX-License-Identifier: Apache-2.0
"""Which engines may run a model, in order. Pure: the host's facts come in.

On a host with a GPU another engine on the GPU comes before the CPU, and the CPU is the last. The
reference itself, ONNX Runtime on the model file, ends every order that it can end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from thirdrail_engines.compile_options import CompileOptions, EngineChoice, TorchCompile
from thirdrail_engines.plans import Builder, Precision

TORCH_SUFFIXES = (".pt2", ".pt")
_EXPORTED = ".pt2"  # the one of them that PyTorch itself runs, and compiles


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Candidate:
    """builder: makes the plan that the engine runs; None: the engine reads the model file."""

    engine: EngineChoice
    device: Device
    builder: Builder | None = None

    @property
    def reads_model(self) -> bool:
        """Whether it is the reference itself: ONNX Runtime on the CPU, with the model file."""
        return self == Candidate(EngineChoice.ONNXRUNTIME, Device.CPU)

    @property
    def name(self) -> str:
        """As reports have it."""
        device = " on cuda" if self.device is Device.CUDA else ""
        plan = _PLANS.get(self.engine, "") if self.builder else ""
        return f"{self.engine}{plan}{device}"


# What engines are called that run a plan, and could do without.
_PLANS = {EngineChoice.ONNXRUNTIME: " plan", EngineChoice.TORCH: " aot_inductor"}


@dataclass(frozen=True, slots=True)
class Host:
    """What there is to run models. tensorrts: the packages that are installed, best first."""

    has_cuda: bool = False
    tensorrts: tuple[Builder, ...] = ()
    has_torch: bool = False
    has_onnxruntime_cuda: bool = False


def engine_order(
    suffix: str, options: CompileOptions, host: Host, *, keeps_plans: bool
) -> tuple[Candidate, ...]:
    """The first is tried, the others are what it may fall back to.

    An engine that was asked for by name is the first, whether the host has it or not.
    suffix: of the model file.
    keeps_plans: whether there is a cache, without which ONNX Runtime's plans are not worth making.
    """
    usual = tuple(_usual_order(suffix, options, host, keeps_plans))
    if options.engine is EngineChoice.AUTO:
        return usual
    asked = [each for each in usual if each.engine is options.engine]
    others = [
        each for each in usual if each.engine is not options.engine and each.engine not in _TENSORRT
    ]
    return (*(asked or [_absent(options.engine, host)]), *others)


_TENSORRT = {
    EngineChoice.TENSORRT: Builder.TENSORRT,
    EngineChoice.TENSORRT_RTX: Builder.TENSORRT_RTX,
}


def _absent(engine: EngineChoice, host: Host) -> Candidate:
    builder = _TENSORRT.get(engine)
    return Candidate(engine, Device.CUDA if builder or host.has_cuda else Device.CPU, builder)


def _usual_order(
    suffix: str, options: CompileOptions, host: Host, keeps_plans: bool
) -> Iterator[Candidate]:
    is_torch = suffix in TORCH_SUFFIXES
    if host.has_cuda:
        for builder in host.tensorrts:
            yield Candidate(EngineChoice(builder), Device.CUDA, builder)
        if suffix == _EXPORTED and host.has_torch:
            yield from _torch(options, Device.CUDA)
        if host.has_onnxruntime_cuda and not is_torch:
            yield Candidate(EngineChoice.ONNXRUNTIME, Device.CUDA)
    if is_torch or _pays(options, keeps_plans):
        yield Candidate(EngineChoice.ONNXRUNTIME, Device.CPU, Builder.ONNXRUNTIME)
    if suffix == _EXPORTED and host.has_torch:
        yield from _torch(options, Device.CPU)
    if not is_torch:
        yield Candidate(EngineChoice.ONNXRUNTIME, Device.CPU)


def _torch(options: CompileOptions, device: Device) -> Iterator[Candidate]:
    """Compiled first, where that is wanted; operator by operator in any case."""
    if options.torch_compile is TorchCompile.AOT_INDUCTOR:
        yield Candidate(EngineChoice.TORCH, device, Builder.AOT_INDUCTOR)
    yield Candidate(EngineChoice.TORCH, device)


def _pays(options: CompileOptions, keeps_plans: bool) -> bool:
    """Whether a plan of ONNX Runtime is worth its build: it must be kept, or change the model."""
    if options.precision is not Precision.AS_IS:
        return True
    return keeps_plans and options.keeps_optimised
