# SPDX-License-Identifier: Apache-2.0
"""Tensors of a run that are on the device already, or stay there. Pure but for its callbacks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape


class Placed(Protocol):
    """A tensor on the device, row-major. Whoever passes it orders the run after its writing."""

    @property
    def address(self) -> int: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """start, stop: of one request, among as many as the batch has; 1 or more."""

    start: int
    stop: int
    of_all: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What one request of a run has on the device.

    on_device: its results that stay there, by name.
    rows: which rows of the run's results are its own; None: all, for it runs alone.
    place: given the shapes of its own results by name, once, if there are any; returns where they
        go, or None to have them dropped. It may raise, which fails the run.
    given: told the stream that the run was given to, when nothing more of this request follows.
    is_in_place: it runs alone, and inputs are read, and results written, where they are, as far as
        that can be.
    is_awaited: its results are to be there when the run is over for its thread.
    """

    on_device: Sequence[str]
    rows: Rows | None
    place: Callable[[Mapping[str, Shape]], Mapping[str, int] | None]
    given: Callable[[Stream], None]
    is_in_place: bool = False
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to be copied on the device."""

    target: int
    source: int
    nbytes: int


def pieces_of(
    placement: Placement,
    outputs: Sequence[TensorSpec],
    shapes: Mapping[str, Shape],
    sources: Mapping[str, int],
) -> Iterator[Piece]:
    """Its part of the run's results, which are at `sources`, to where it is to stay.

    Raises EngineError for a result without its rows, and what `place` raises.
    """
    rows = placement.rows
    kept = {name: _own_shape(name, shapes[name], rows) for name in placement.on_device}
    places = placement.place(kept) if kept else None
    if places is None:
        return
    for spec in outputs:
        if spec.name not in kept:
            continue
        first = 0 if rows is None else rows.start * math.prod(shapes[spec.name][1:])
        nbytes = math.prod(kept[spec.name]) * spec.dtype.itemsize
        if nbytes:
            source = sources[spec.name] + first * spec.dtype.itemsize
            yield Piece(places[spec.name], source, nbytes)


def spans_for_host(
    placements: Sequence[Placement], name: str, nbytes: int
) -> Iterator[tuple[int, int]]:
    """Where the rows of a result begin and end, in bytes, that no request keeps on the device.

    placements: in the order of their rows.
    """
    kept = [each.rows for each in placements if each.rows is not None and name in each.on_device]
    row_bytes = nbytes // kept[0].of_all if kept else 0
    start = 0
    for rows in kept:
        if rows.start * row_bytes > start:
            yield start, rows.start * row_bytes
        start = rows.stop * row_bytes
    if nbytes > start:
        yield start, nbytes


def _own_shape(name: str, shape: Shape, rows: Rows | None) -> Shape:
    if rows is None:
        return shape
    if not shape or shape[0] != rows.of_all:
        raise EngineError(
            f"output '{name}' has the shape {list(shape)} for a batch of {rows.of_all} rows"
        )
    return (rows.stop - rows.start, *shape[1:])
