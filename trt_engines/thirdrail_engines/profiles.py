# SPDX-License-Identifier: Apache-2.0
"""Optimisation profiles: which shapes a plan takes. Read from text, derived, checked on the model.

A plan is built for ranges of shapes. Where the first dimension is the only open one, its range
follows from the batch size; every other open dimension is the owner's to say, since nobody else
knows whether images of 64 or of 4096 pixels will come. What is missing is an error that holds the
very lines to write.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from thirdrail.tensors import RANK_MAX, TensorSpec
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.plans import BuildError, BuildFault, Profile, Shape, ShapeRange

PROFILES_MAX = 16
DIM_MAX = (1 << 31) - 1  # TensorRT's

GivenProfile = Mapping[str, ShapeRange]  # by input, as the configuration has it

_RANGE_EXAMPLE = "1x3x32x32,4x3x64x64,8x3x128x128"
_SHAPE = re.compile(r"[0-9]{1,20}(x[0-9]{1,20})*")
# In a line to write, for a dimension that is the owner's to say.
_SIZES_SUGGESTED = (32, 64, 128)


class ProfileError(ModelFileError):
    """A profile of the configuration contradicts the model: a mistake, whatever the engine."""


class ShapesUnknown(BuildError):
    """Open dimensions of which nobody says the sizes.

    reason: without the lines to write. suggested: by input, a range as configurations have it.
    """

    def __init__(self, reason: str, advice: str, suggested: Mapping[str, str]) -> None:
        super().__init__(BuildFault.REFUSED, f"{reason}; {advice}: {profile_lines(0, suggested)}")
        self.reason = reason
        self.suggested = suggested


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows that requests will be batched to: the usual number, and the most.

    is_promised: the configuration says so, hence profiles that it gives must allow as many.
    """

    best: int
    largest: int
    is_promised: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.best <= self.largest:
            raise ValueError(
                f"batch rows are best {self.best}, largest {self.largest}; expected "
                "1 <= best <= largest"
            )


def read_shape_range(text: str) -> ShapeRange:
    """The range that `1x3x32x32,4x3x64x64,8x3x128x128` says: smallest, best, largest.

    Raises ValueError, whose text says what is wrong without naming the key.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3:
        raise ValueError(
            f"has {len(parts)} shapes, expected three: smallest,best,largest, "
            f"for example {_RANGE_EXAMPLE}"
        )
    given = ShapeRange(*(_read_shape(part) for part in parts))
    if len({len(shape) for shape in _shapes(given)}) > 1:
        ranks = ", ".join(str(len(shape)) for shape in _shapes(given))
        raise ValueError(f"has shapes of {ranks} dimensions, expected three of the same rank")
    for axis in range(len(given.best)):
        sizes = [shape[axis] for shape in _shapes(given)]
        if any(left > right for left, right in pairwise(sizes)):
            raise ValueError(
                f"has the sizes {sizes} on axis {axis}, expected smallest <= best <= largest"
            )
    return given


def write_shape_range(given: ShapeRange) -> str:
    """The text that `read_shape_range` reads."""
    return ",".join("x".join(map(str, shape)) for shape in _shapes(given))


def config_line(key: str, value: str) -> str:
    """One parameter as config.pbtxt has it."""
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def profiles_for(
    inputs: Iterable[TensorSpec],
    given: Sequence[GivenProfile],
    rows: BatchRows | None,
    unranked: frozenset[str] = frozenset(),
) -> tuple[Profile, ...]:
    """The profiles to build a model with; none where no input has an open dimension.

    inputs: the model's, -1 for an open dimension. Optional ones are constants to a plan.
    rows: None where requests are not batched: then an open first dimension is as unknown as others.
    unranked: inputs whose rank the model does not tell.
    Raises ProfileError where a given profile contradicts the model or the batch size, BuildError
    (REFUSED) where one must be given; its text holds the lines to write.
    """
    required = {tensor.name: tensor for tensor in inputs if not tensor.optional}
    open_inputs = {
        name: tensor for name, tensor in required.items() if name in unranked or -1 in tensor.shape
    }
    if not given:
        return (_derived(open_inputs, rows, unranked),) if open_inputs else ()
    for number, profile in enumerate(given):
        _check_profile(number, profile, required, open_inputs, rows, unranked)
    _check_rows(given, open_inputs, rows)
    profiles = (
        Profile({name: profile[name] for name in open_inputs}) for profile in given if open_inputs
    )
    return tuple(profiles)


def _read_shape(text: str) -> Shape:
    if not _SHAPE.fullmatch(text):
        raise ValueError(
            f"has the shape {text[:80]!a}, expected sizes with x between, for example 1x3x32x32"
        )
    shape = tuple(map(int, text.split("x")))
    if min(shape) < 1 or max(shape) > DIM_MAX:
        raise ValueError(f"has the shape {text}, expected sizes from 1 to {DIM_MAX}")
    if len(shape) > RANK_MAX:
        raise ValueError(f"has a shape of {len(shape)} dimensions, expected at most {RANK_MAX}")
    return shape


def _shapes(given: ShapeRange) -> tuple[Shape, Shape, Shape]:
    return given.smallest, given.best, given.largest


def _derived(
    open_inputs: Mapping[str, TensorSpec], rows: BatchRows | None, unranked: frozenset[str]
) -> Profile:
    reasons = [
        _unknown_sizes(tensor, rows, unranked)
        for tensor in open_inputs.values()
        if tensor.name in unranked or rows is None or -1 in tensor.shape[1:]
    ]
    if reasons:
        is_only_rows = not any(
            tensor.name in unranked or -1 in tensor.shape[1:] for tensor in open_inputs.values()
        )
        raise ShapesUnknown(
            "a plan needs the sizes of every open dimension, and nothing says those of "
            + ", ".join(reasons),
            f"{'set max_batch_size, or ' if is_only_rows else ''}write into config.pbtxt, with "
            "the smallest, best and largest sizes that you use",
            suggested_ranges(open_inputs.values(), rows, unranked),
        )
    return Profile({name: _suggested(tensor.shape, rows) for name, tensor in open_inputs.items()})


def _unknown_sizes(tensor: TensorSpec, rows: BatchRows | None, unranked: frozenset[str]) -> str:
    if tensor.name in unranked:
        return f"input '{tensor.name}', whose rank is not known either"
    axes = [i for i, dim in enumerate(tensor.shape) if dim == -1 and (i > 0 or rows is None)]
    word = "axis" if len(axes) == 1 else "axes"
    return f"{word} {' and '.join(map(str, axes))} of input '{tensor.name}' {list(tensor.shape)}"


def suggested_ranges(
    tensors: Iterable[TensorSpec], rows: BatchRows | None, unranked: frozenset[str]
) -> dict[str, str]:
    """By input, what could be written: a whole profile, where these are all with an open
    dimension."""
    return {
        tensor.name: write_shape_range(
            _suggested((-1,) if tensor.name in unranked else tensor.shape, rows)
        )
        for tensor in tensors
    }


def profile_lines(number: int, ranges: Mapping[str, str]) -> str:
    """One profile as config.pbtxt has it."""
    return " ".join(config_line(f"profile.{number}.{name}", text) for name, text in ranges.items())


def _suggested(shape: Shape, rows: BatchRows | None) -> ShapeRange:
    """The rows that are known, and sizes of our own for every other open dimension."""
    of_rows = (1, rows.best, rows.largest) if rows else (1, 4, 8)

    def sizes(which: int) -> Shape:
        return tuple(
            dim if dim != -1 else of_rows[which] if axis == 0 else _SIZES_SUGGESTED[which]
            for axis, dim in enumerate(shape)
        )

    return ShapeRange(sizes(0), sizes(1), sizes(2))


def _check_profile(
    number: int,
    profile: GivenProfile,
    required: Mapping[str, TensorSpec],
    open_inputs: Mapping[str, TensorSpec],
    rows: BatchRows | None,
    unranked: frozenset[str],
) -> None:
    for name, given in profile.items():
        key = f"profile.{number}.{name}"
        if name not in required:
            names = ", ".join(f"'{known}'" for known in required) or "none"
            raise ProfileError(f"{key}: the model has no input '{name}', its inputs are {names}")
        if name not in unranked:
            _check_range(key, given, required[name].shape)
    absent = [tensor for name, tensor in open_inputs.items() if name not in profile]
    if absent:
        names = ", ".join(f"'{tensor.name}' {list(tensor.shape)}" for tensor in absent)
        raise ProfileError(
            f"profile {number} must name every input with an open dimension, and lacks {names}; "
            "write into config.pbtxt, with sizes that fit the others: "
            + profile_lines(number, suggested_ranges(absent, rows, unranked))
        )


def _check_range(key: str, given: ShapeRange, shape: Shape) -> None:
    if len(given.best) != len(shape):
        raise ProfileError(
            f"{key} has shapes of {len(given.best)} dimensions, the model's input has "
            f"{len(shape)}: {list(shape)}"
        )
    for axis, dim in enumerate(shape):
        wrong = next((s[axis] for s in _shapes(given) if dim not in (-1, s[axis])), None)
        if wrong is not None:
            raise ProfileError(
                f"{key} has the size {wrong} on axis {axis}, where the model's input is fixed at "
                f"{dim}: {list(shape)}"
            )


def _check_rows(
    given: Sequence[GivenProfile],
    open_inputs: Mapping[str, TensorSpec],
    rows: BatchRows | None,
) -> None:
    """Every number of rows up to a promised batch size must fit into one of the profiles."""
    if rows is None or not rows.is_promised:
        return
    batched = [name for name, tensor in open_inputs.items() if tensor.shape[:1] == (-1,)]
    for name in batched:
        smallest = min(profile[name].smallest[0] for profile in given)
        largest = max(profile[name].largest[0] for profile in given)
        if smallest > 1 or largest < rows.largest:
            raise ProfileError(
                f"profile.*.{name} take {smallest} to {largest} rows, but max_batch_size "
                f"{rows.largest} promises 1 to {rows.largest}"
            )
    if batched and (gap := _first_gap(given, batched)) <= rows.largest:
        names = ", ".join(f"'{name}'" for name in batched)
        raise ProfileError(
            f"no profile takes a batch of {gap} in {names}, but max_batch_size {rows.largest} "
            f"promises every number from 1 to {rows.largest}: let one begin where another ends"
        )


def _first_gap(given: Sequence[GivenProfile], batched: Sequence[str]) -> int:
    """The smallest number of rows that no profile takes, in all these inputs at once."""
    taken = sorted(
        (
            max(profile[name].smallest[0] for name in batched),
            min(profile[name].largest[0] for name in batched),
        )
        for profile in given
    )
    gap = 1
    for least, most in taken:
        if least <= gap:
            gap = max(gap, most + 1)
    return gap


def _quoted(text: str) -> str:
    """A string as protobuf's text format has it, on one line."""
    plain = "".join(
        c
        if c.isprintable() and c not in '"\\'
        else "".join(f"\\{byte:03o}" for byte in c.encode(errors="surrogateescape"))
        for c in text
    )
    return f'"{plain}"'
