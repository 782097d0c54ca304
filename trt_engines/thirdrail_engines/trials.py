# SPDX-License-Identifier: Apache-2.0
"""What an engine and its reference are run on: seeded inputs of the shapes that count."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thirdrail.dtypes import object_array
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.output_figures import is_float
from thirdrail_engines.plans import Profile, Shape
from thirdrail_engines.proof import FLOATS, random_array

# The largest whole number, and whether floats are positive: values that one model or another
# accepts (see proof.py). The last are for those that take roots and logarithms.
KINDS = ((100, False), (1, False), (1, True))

_SEED = 1
_TEXT_BYTES = 64  # taken for one element of text
_SIZES = (32, 64, 8, 1)  # of open dimensions that no profile speaks of


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values that an input takes, both ends among them, where any number would not do."""

    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Trial:
    name: str
    seed: int
    alternatives: tuple[Mapping[TensorSpec, Shape], ...]  # until the reference takes one

    @property
    def bytes(self) -> int:
        return bytes_of(self.alternatives[0])


def trials(spec: EngineSpec, profiles: Sequence[Profile], times: int = 1) -> Iterator[Trial]:
    """Best shapes before the smallest and the largest: time may end before they all had theirs.

    times: how often the best ones come. Again only after all others, and on other inputs, so that
    results which were left from before are no right ones.
    """
    once = list(_trials(spec, profiles))
    yield from once
    for number in range(1, times):
        for trial in once[: max(1, len(profiles))]:
            yield replace(trial, name=f"{trial.name} {number + 1}", seed=_SEED + number)


def _trials(spec: EngineSpec, profiles: Sequence[Profile]) -> Iterator[Trial]:
    inputs = [tensor for tensor in spec.inputs if not tensor.optional]
    if not profiles:
        yield Trial("trial sizes", _SEED, tuple(_filled(inputs, size, size) for size in _SIZES))
        if any(-1 in tensor.shape for tensor in inputs):
            alternatives = tuple(_filled(inputs, 1, size) for size in _SIZES)
            yield Trial("trial sizes, one row", _SEED, alternatives)
        return
    for kind in ("best", "smallest", "largest"):
        for number, profile in enumerate(profiles):
            shapes = {
                tensor: getattr(profile.inputs[tensor.name], kind)
                if tensor.name in profile.inputs
                else tensor.shape
                for tensor in inputs
            }
            yield Trial(f"profile {number} {kind}", _SEED, (shapes,))


def _filled(inputs: Iterable[TensorSpec], rows: int, size: int) -> dict[TensorSpec, Shape]:
    return {
        tensor: tuple(
            dim if dim != -1 else rows if axis == 0 else size
            for axis, dim in enumerate(tensor.shape)
        )
        for tensor in inputs
    }


def bytes_of(shapes: Mapping[TensorSpec, Shape]) -> int:
    return sum(
        math.prod(shape) * (tensor.dtype.itemsize or _TEXT_BYTES)
        for tensor, shape in shapes.items()
    )


def seeded(
    shapes: Mapping[TensorSpec, Shape],
    values: Mapping[str, ValueRange],
    whole_max: int,
    *,
    is_positive: bool,
    seed: int = _SEED,
) -> dict[str, Array]:
    """Inputs of these shapes, for one seed always the same. values: in place of the kind."""
    random = np.random.default_rng(seed)
    inputs = {}
    for tensor, shape in shapes.items():
        array = random_array(random, tensor, shape, whole_max)
        if tensor.name in values:
            array = _within(random, array, values[tensor.name])
        elif is_positive and is_float(array):
            array = np.abs(array)
        inputs[tensor.name] = array
    return inputs


def _within(random: "np.random.Generator", array: Array, wanted: ValueRange) -> Array:
    """Of the same type and shape, with these values."""
    if is_float(array):
        return random.uniform(wanted.lowest, wanted.highest, array.shape).astype(array.dtype)
    whole = random.integers(
        math.ceil(wanted.lowest), math.floor(wanted.highest), array.shape, endpoint=True
    )
    if array.dtype == np.object_:
        return object_array([b"%d" % number for number in whole.flat], array.shape)
    return whole.astype(array.dtype)


def value_fault(tensor: TensorSpec, values: ValueRange) -> str:
    """Why an input cannot take these; "" if it can."""
    numpy = tensor.dtype.numpy
    if tensor.dtype in FLOATS:
        return ""
    lowest, highest = math.ceil(values.lowest), math.floor(values.highest)
    if lowest > highest:
        return f"there is no whole number from {values.lowest:g} to {values.highest:g}"
    if numpy is None or numpy.kind not in "iub":
        return ""
    least, most = (0, 1) if numpy.kind == "b" else (np.iinfo(numpy).min, np.iinfo(numpy).max)
    if lowest < least or highest > most:
        return f"{lowest} to {highest} is not within {least} to {most} of {tensor.dtype.name}"
    return ""
