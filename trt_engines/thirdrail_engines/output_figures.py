# SPDX-License-Identifier: Apache-2.0
"""How far one output is from another, in figures."""

from dataclasses import dataclass

import numpy as np

from thirdrail.dtypes import dtype_of_array
from thirdrail.tensors import Array
from thirdrail_engines.proof import FLOATS

# A smaller output is noise of its own sums: it is measured against this.
_SCALE_MIN = 1e-6
_ERROR_MAX = 1e290  # sums of such are finite, and so is what they are divided by


@dataclass(frozen=True, slots=True)
class OutputFigures:
    """The worst of one output over all runs. The defaults say that there is no difference."""

    name: str
    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_rel: float = 0.0
    mean_rel: float = 0.0
    cosine: float = 1.0
    equal: float = 1.0  # part of the elements that are no floats
    not_finite: int = 0  # elements that are NaN or infinite here, and something else there
    compared: int = 0  # elements
    fault: str = ""  # beyond figures: another shape or type


def compare(name: str, got: Array, expected: Array) -> OutputFigures:
    """One output of one run. Floats are compared as FP64; NaN equals NaN, infinities by sign."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        fault = (
            f"is {got.dtype} {list(got.shape)}, the reference {expected.dtype} "
            f"{list(expected.shape)}"
        )
        return OutputFigures(name, fault=fault)
    if not is_float(expected):
        equal = float((got == expected).mean()) if expected.size else 1.0
        return OutputFigures(name, equal=equal, compared=expected.size)
    left = got.astype(np.float64).ravel()
    right = expected.astype(np.float64).ravel()
    is_finite = np.isfinite(left) & np.isfinite(right)
    is_same = (left == right) | (np.isnan(left) & np.isnan(right))
    not_finite = int((~is_finite & ~is_same).sum())
    left, right = left[is_finite], right[is_finite]
    if not right.size:
        return OutputFigures(name, not_finite=not_finite)
    with np.errstate(over="ignore"):  # FP64 near its end
        error = np.minimum(np.abs(left - right), _ERROR_MAX)
        size = np.minimum(np.abs(right), _ERROR_MAX)
    max_abs, mean_abs = float(error.max()), float(error.mean())
    return OutputFigures(
        name,
        max_abs=max_abs,
        mean_abs=mean_abs,
        max_rel=max_abs / max(float(size.max()), _SCALE_MIN),
        mean_rel=mean_abs / max(float(size.mean()), _SCALE_MIN),
        cosine=_cosine(left, right),
        not_finite=not_finite,
        compared=right.size,
    )


def _cosine(left: Array, right: Array) -> float:
    """Of vectors too small to have a direction: 1."""
    top = max(float(np.abs(left).max()), float(np.abs(right).max()))
    if top < _SCALE_MIN:
        return 1.0
    left, right = left / top, right / top  # squares of large numbers would overflow
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    return min(1.0, float(left @ right) / norms) if norms else 0.0


def worse(one: OutputFigures, other: OutputFigures) -> OutputFigures:
    return OutputFigures(
        one.name,
        max_abs=max(one.max_abs, other.max_abs),
        mean_abs=max(one.mean_abs, other.mean_abs),
        max_rel=max(one.max_rel, other.max_rel),
        mean_rel=max(one.mean_rel, other.mean_rel),
        cosine=min(one.cosine, other.cosine),
        equal=min(one.equal, other.equal),
        not_finite=one.not_finite + other.not_finite,
        compared=one.compared + other.compared,
        fault=one.fault or other.fault,
    )


def is_float(array: Array) -> bool:
    return dtype_of_array(array) in FLOATS


def figure_beside(bound: float, figure: float, digits: int) -> str:
    """A figure that is not its bound, in `digits` digits or as many as show that."""
    texts = (f"{figure:.{count}g}" for count in range(digits, 18))
    return next(text for text in texts if float(text) != bound)
