# SPDX-License-Identifier: Apache-2.0
"""The words of compiling: what is to be built, how it is told, what goes wrong.

A plan is compiled bytes: an entry of the plan cache, never the truth. Everything here is plain
data, and imports no engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from thirdrail_engines.engine import ModelFileError

Shape = tuple[int, ...]

# Called with the phase and how far it has come; `steps` is 0 where nobody knows. From any thread.
TellProgress = Callable[[str, int, int], None]


class Builder(StrEnum):
    """Who makes plans. But for AOTInductor, whose plans PyTorch runs, the value is also the name of
    the engine that runs them."""

    ONNXRUNTIME = "onnxruntime"  # the graph after ONNX Runtime's optimisations, for this CPU
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"  # TensorRT for RTX
    AOT_INDUCTOR = "aot_inductor"  # native code that PyTorch generates, for this CPU or GPU


class Precision(StrEnum):
    """What the graph is converted to before it is built."""

    AS_IS = "as_is"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes of one input that a plan takes, and the one it is fastest for."""

    smallest: Shape
    best: Shape
    largest: Shape


@dataclass(frozen=True, slots=True)
class Profile:
    """One of a plan's optimisation profiles."""

    inputs: Mapping[str, ShapeRange]  # those with an open dimension


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Everything that changes a plan. Its key in the cache is made of these and of file contents.

    target: what else the plan is tied to, in words that name it exactly: the CPU's instruction
        sets, or a GPU with its driver; "" where it is tied to nothing.
    """

    source: Path  # .onnx (and the weights it keeps beside it), .pt2 or .pt
    builder: Builder
    builder_version: str  # of the package; "": whichever is here
    precision: Precision = Precision.AS_IS
    profiles: tuple[Profile, ...] = ()
    compute_capabilities: tuple[str, ...] = ()  # "sm86"; none: the GPU at hand
    target: str = ""
    converter: str = ""  # what made the precision, and its version; "" for AS_IS
    rules: str = ""  # of ours, by which more is written into the plan; "" where nothing is
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    is_version_compatible: bool = False
    is_refittable: bool = False
    plugins: tuple[Path, ...] = ()
    # These change how a plan is built and not what it is, so they are no part of the key.
    uses_timing_cache: bool = field(default=True, compare=False)
    threads_max: int = field(default=0, compare=False)  # 0: the builder decides


class BuildFault(StrEnum):
    """Why there is no plan."""

    REFUSED = "refused"  # the builder does not take this model, or not with these options
    MISSING = "missing"  # a package, device or file that the build needs is not here
    CRASHED = "crashed"
    OUT_OF_TIME = "out of time"
    OUT_OF_MEMORY = "out of memory"
    OUT_OF_DISK = "out of disk"
    CANCELLED = "cancelled"
    SOURCE_CHANGED = "source changed"  # while it was built


class BuildError(ModelFileError):
    """No plan came of a build. The text says whose fault it is and what would help."""

    def __init__(self, fault: BuildFault, text: str) -> None:
        super().__init__(text)
        self.fault = fault
