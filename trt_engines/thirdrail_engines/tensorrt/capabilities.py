# SPDX-License-Identifier: Apache-2.0
"""Compute capabilities by name: which GPU a plan is for."""

from collections.abc import Sequence

from thirdrail_engines.plans import Builder, BuildError, BuildFault
from thirdrail_engines.tensorrt.api import CURRENT, capability_names, title_of

# NVIDIA's names: https://developer.nvidia.com/cuda-gpus
_FAMILIES = {
    "sm50": "Maxwell",
    "sm52": "Maxwell",
    "sm60": "Pascal",
    "sm61": "Pascal",
    "sm70": "Volta",
    "sm72": "Xavier",
    "sm75": "Turing",
    "sm80": "Ampere: A100, A30",
    "sm86": "Ampere: A10, RTX 30",
    "sm87": "Orin",
    "sm88": "Ampere",
    "sm89": "Ada: L4, L40, RTX 40",
    "sm90": "Hopper: H100, H200",
    "sm100": "Blackwell: B200",
    "sm103": "Blackwell: B300",
    "sm110": "Thor",
    "sm120": "Blackwell: RTX 50, RTX PRO",
    "sm121": "Blackwell: GB10",
}


def check_capabilities(builder: Builder, names: Sequence[str]) -> tuple[str, ...]:
    """The names that PlanRequest.compute_capabilities takes: each once, in order of size.

    names: like "sm86"; capitals, "sm_86" and "8.6" mean the same. None of them: the GPU at hand.
    Raises BuildError: REFUSED for a name that is none or that the package does not build for,
    MISSING where the package is not installed.
    """
    wanted = sorted({_spelled(name) for name in names}, key=lambda name: (len(name), name))
    if not wanted:
        return ()
    possible = capability_names(builder)
    for name in wanted:
        if name not in possible:
            raise BuildError(BuildFault.REFUSED, _refusal(builder, name, possible))
    if CURRENT in wanted and len(wanted) > 1:
        raise BuildError(
            BuildFault.REFUSED,
            f"compute capabilities {', '.join(wanted)}: 'current' goes with no other. "
            "Name the others only, or leave all out",
        )
    return tuple(wanted)


def _spelled(name: str) -> str:
    plain = name.strip().lower()
    digits = plain.removeprefix("sm").removeprefix("_").replace(".", "")
    return f"sm{digits}" if digits.isascii() and digits.isdecimal() else plain


def _refusal(builder: Builder, name: str, possible: Sequence[str]) -> str:
    if name not in _FAMILIES:
        known = ", ".join((*_FAMILIES, CURRENT))
        return f"'{name}' is no compute capability, expected some of {known}"
    what = f"{name} ({_FAMILIES[name]})"
    if builder is Builder.TENSORRT:
        return (
            f"{title_of(builder)} builds for the GPU at hand only, not for {what} by name: leave "
            f"compute_capabilities out and build on that GPU, or take {Builder.TENSORRT_RTX}"
        )
    return (
        f"{title_of(builder)} does not build for {what}, only for {', '.join(possible)}. "
        f"For such a GPU take the engine {Builder.TENSORRT}, which builds on the GPU itself"
    )
