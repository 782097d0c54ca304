# SPDX-License-Identifier: Apache-2.0
"""What the owner of a model decides about its compilation, read once from text.

In config.pbtxt these are `parameters`. Keys that are not named here belong to others; a key that
is, with a value that cannot be, is an error that says what would do.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from thirdrail.errors import InvalidArgument
from thirdrail_engines.expectations import Reference
from thirdrail_engines.plans import Precision, ShapeRange
from thirdrail_engines.profiles import (
    PROFILES_MAX,
    BatchRows,
    GivenProfile,
    config_line,
    read_shape_range,
)
from thirdrail_engines.reference_proof import Tolerance
from thirdrail_engines.trials import ValueRange

WORKSPACE_MIB_MAX = 1 << 20
LEVEL_MAX = 5  # TensorRT's highest
OUTPUTS_MAX = 10_000


class EngineChoice(StrEnum):
    """Which engine shall run a model."""

    AUTO = "auto"  # the fastest that the host has
    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"
    TORCH = "torch"


class TorchCompile(StrEnum):
    """How PyTorch runs a program, where it is the engine."""

    EAGER = "eager"  # operator by operator
    AOT_INDUCTOR = "aot_inductor"  # as native code, compiled before


class OnFailure(StrEnum):
    """What becomes of a model whose first engine cannot be had, or is not proven."""

    FALLBACK = "fallback"  # the next engine, visibly
    FAIL = "fail"  # the load fails


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """Valid by construction: `read_compile_options` is where text is checked."""

    engine: EngineChoice = EngineChoice.AUTO
    precision: Precision = Precision.AS_IS
    on_failure: OnFailure = OnFailure.FALLBACK
    serve_while_compiling: bool = False
    profiles: tuple[GivenProfile, ...] = ()
    rows: BatchRows | None = None  # None: requests are not batched
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    is_version_compatible: bool = False
    is_refittable: bool = False
    plugins: tuple[Path, ...] = ()  # relative ones lie beside the model file
    uses_timing_cache: bool = True
    tolerance: Tolerance = field(default_factory=Tolerance)  # None in it: the default's
    # By input, for the runs of the proof: what it takes, where seeded numbers of any kind would not
    # do.
    proof_values: Mapping[str, ValueRange] = field(default_factory=dict)
    # None: PyTorch for what PyTorch runs, ONNX Runtime for all else.
    proof_reference: Reference | None = None
    # Whether ONNX Runtime keeps the graph that it has optimised, and loads that the next time. It
    # pays where optimising takes long: thousands of nodes, large constants to be folded. Where
    # weights are most of the model, reading and checking a plan takes longer than optimising.
    keeps_optimised: bool = False
    torch_compile: TorchCompile = TorchCompile.EAGER


def read_compile_options(
    parameters: Mapping[str, str], rows: BatchRows | None = None
) -> CompileOptions:
    """The options among a model's parameters; keys of others are passed over.

    rows: what the configuration says about batching.
    Raises InvalidArgument: which key, what came, what is allowed, and a line that would do.
    """
    values: dict[str, Any] = {}
    tolerance: dict[str, Any] = {}
    for key, text in parameters.items():
        row = _KEYS.get(key)
        if row is None:
            continue
        value = _read(key, text, row)
        if key.startswith(_TOLERANCE):
            tolerance[row.field] = value
        else:
            values[row.field] = value
    return CompileOptions(
        **values,
        rows=rows,
        profiles=_read_profiles(parameters),
        proof_values=_read_proof_values(parameters),
        tolerance=Tolerance(**tolerance),
    )


def is_compile_key(key: str) -> bool:
    """True for a parameter that `read_compile_options` reads."""
    return key in _KEYS or key.startswith((_PROFILE, PROOF))


@dataclass(frozen=True, slots=True)
class _Key:
    field: str
    read: Callable[[str], Any]  # raises ValueError for what is not allowed
    allowed: str
    example: str


def _read(key: str, text: str, row: _Key) -> Any:
    try:
        return row.read(text.strip())
    except ValueError:
        raise InvalidArgument(
            f"parameters['{key}'] is {text[:80]!a}, expected {row.allowed}; "
            f"for example: {config_line(key, row.example)}"
        ) from None


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _number(least: int, most: int, unit: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError
        return int(text) * unit

    return read


def _real(most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not 0 <= value <= most:  # false for a NaN
            raise ValueError
        return value

    return read


def _capabilities(text: str) -> tuple[str, ...]:
    """Whether there are such is the builder's to say (thirdrail_engines.tensorrt)."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"(sm_?)?[0-9.]{2,5}|current", name, re.I) for name in names):
        raise ValueError
    return names


def _files(text: str) -> tuple[Path, ...]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or "\0" in text:
        raise ValueError
    return tuple(map(Path, names))


PROOF = "proof."
_TOLERANCE = "tolerance."
_PROFILE = "profile."
_FLAG = ("true or false", "true")
_FINITE_MAX = 1e300
_WHOLE_MAX = 1e15  # exact as a float
_DISTANCE = (_real(_FINITE_MAX), "a number of 0 or more", "0.001")
_PART = (_real(1.0), "a number from 0 to 1", "0.999")
_MIB = 1 << 20

_KEYS: dict[str, _Key] = {
    "engine": _Key("engine", EngineChoice, f"one of {', '.join(EngineChoice)}", "tensorrt_rtx"),
    "precision": _Key("precision", Precision, f"one of {', '.join(Precision)}", "fp16"),
    "on_compile_failure": _Key("on_failure", OnFailure, " or ".join(OnFailure), "fail"),
    "serve_while_compiling": _Key("serve_while_compiling", _flag, *_FLAG),
    "workspace_mib": _Key(
        "workspace_bytes",
        _number(1, WORKSPACE_MIB_MAX, _MIB),
        f"a whole number of MiB from 1 to {WORKSPACE_MIB_MAX}",
        "2048",
    ),
    "builder_optimization_level": _Key(
        "optimization_level", _number(0, LEVEL_MAX), f"a level from 0 to {LEVEL_MAX}", "3"
    ),
    "compute_capabilities": _Key(
        "compute_capabilities",
        _capabilities,
        "compute capabilities with commas between them",
        "sm86,sm89,sm120",
    ),
    "version_compatible": _Key("is_version_compatible", _flag, *_FLAG),
    "refit": _Key("is_refittable", _flag, *_FLAG),
    "timing_cache": _Key("uses_timing_cache", _flag, *_FLAG),
    "plugins": _Key("plugins", _files, "files with commas between them", "/opt/plugins/libroi.so"),
    "keep_optimised": _Key("keeps_optimised", _flag, *_FLAG),
    "torch_compile": _Key(
        "torch_compile", TorchCompile, " or ".join(TorchCompile), TorchCompile.AOT_INDUCTOR
    ),
    "proof_reference": _Key("proof_reference", Reference, " or ".join(Reference), Reference.TORCH),
    "tolerance.max_abs": _Key("max_abs", *_DISTANCE),
    "tolerance.mean_abs": _Key("mean_abs", *_DISTANCE),
    "tolerance.max_rel": _Key("max_rel", *_DISTANCE),
    "tolerance.mean_rel": _Key("mean_rel", *_DISTANCE),
    "tolerance.cosine": _Key("cosine", *_PART),
    "tolerance.equal": _Key("equal", *_PART),
    "tolerance.uncompared": _Key(
        "uncompared", _number(0, OUTPUTS_MAX), "a number of outputs from 0", "1"
    ),
}


def _read_proof_values(parameters: Mapping[str, str]) -> dict[str, ValueRange]:
    """From `proof.<input>` = 16000 for one value, or 0..7 for a range."""
    found = {}
    for key, text in parameters.items():
        name = key.removeprefix(PROOF)
        if name == key:
            continue
        lowest, dots, highest = text.strip().partition("..")
        try:
            values = ValueRange(float(lowest), float(highest if dots else lowest))
        except ValueError:
            values = ValueRange(1, 0)
        if not (-_WHOLE_MAX <= values.lowest <= values.highest <= _WHOLE_MAX and name):
            raise InvalidArgument(
                f"parameters['{key[:80]}'] is {text[:80]!a}, expected for an input one value, or "
                f"the lowest and the highest with .. between, within {_WHOLE_MAX:.0f} of 0; for "
                f"example: {config_line(PROOF + 'x', '0..7')}"
            )
        found[name] = values
    return found


def _read_profiles(parameters: Mapping[str, str]) -> tuple[GivenProfile, ...]:
    """From `profile.<N>.<input>` = smallest,best,largest; the numbers start at 0 without a gap."""
    profiles: dict[int, dict[str, ShapeRange]] = {}
    for key, text in parameters.items():
        if not key.startswith(_PROFILE):
            continue
        number, _, name = key.removeprefix(_PROFILE).partition(".")
        if not re.fullmatch(r"[0-9]{1,2}", number) or int(number) >= PROFILES_MAX or not name:
            raise InvalidArgument(
                f"parameters['{key[:80]}'] is no profile, expected profile.<number from 0 to "
                f"{PROFILES_MAX - 1}>.<input>; for example: "
                + config_line("profile.0.x", "1x3x32x32,4x3x64x64,8x3x128x128")
            )
        try:
            profiles.setdefault(int(number), {})[name] = read_shape_range(text)
        except ValueError as error:
            raise InvalidArgument(f"parameters['{key[:80]}'] {error}") from None
    absent = next((n for n in range(len(profiles)) if n not in profiles), None)
    if absent is not None:
        raise InvalidArgument(
            f"parameters has profile.{max(profiles)} and no profile.{absent}: "
            "number the profiles from 0 without a gap"
        )
    return tuple(profiles[number] for number in sorted(profiles))
