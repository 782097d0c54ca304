# SPDX-License-Identifier: Apache-2.0
"""Which part of a batch's results goes to where one of its requests keeps it."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.placed import Placement, Rows, pieces_of, spans_for_host
from thirdrail_engines.cuda.request import Request
from thirdrail_engines.engine import EngineError
from thirdrail_engines.plans import Shape

OUTPUTS = (
    TensorSpec("y", BY_NAME["FP32"], (-1, 3)),
    TensorSpec("z", BY_NAME["INT64"], (-1,)),
    TensorSpec("e", BY_NAME["UINT8"], (-1, 0)),
)
SOURCES = {"y": 1 << 20, "z": 2 << 20, "e": 3 << 20}


def nothing(stream: object) -> None: ...


def nowhere(own: Mapping[str, Shape]) -> dict[str, int]:
    pytest.fail("there is nothing to be placed")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_each_element_goes_to_its_owner_once(counts: list[int]) -> None:
    rows = sum(counts)
    shapes = {"y": (rows, 3), "z": (rows,), "e": (rows, 0)}
    found: dict[str, list[int]] = {"y": [], "z": []}
    placements: list[Placement] = []
    stop = 0
    for count in counts:
        start, stop = stop, stop + count
        told: dict[str, Shape] = {}

        def place(own: Mapping[str, Shape], told: dict[str, Shape] = told) -> dict[str, int]:
            told.update(own)
            return {name: SOURCES[name] + (1 << 30) for name in own}

        placement = Placement(["e", "y", "z"], Rows(start, stop, rows), place, nothing)
        pieces = list(pieces_of(placement, OUTPUTS, shapes, SOURCES))
        placements.append(placement)
        assert told == {"y": (count, 3), "z": (count,), "e": (count, 0)}
        for piece, name in zip(pieces, ("y", "z"), strict=True):  # and not what has no bytes
            assert piece.target == SOURCES[name] + (1 << 30)
            first = piece.source - SOURCES[name]
            found[name] += range(first, first + piece.nbytes)
    for spec in OUTPUTS[:2]:
        total = math.prod(shapes[spec.name]) * spec.dtype.itemsize
        assert found[spec.name] == list(np.arange(total))
        assert list(spans_for_host(placements, spec.name, total)) == []
        assert list(spans_for_host([], spec.name, total)) == ([(0, total)] if total else [])


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=8))
def test_what_nobody_keeps_on_the_device_goes_to_the_host(members: list[tuple[int, bool]]) -> None:
    """Each of some rows, and whether it keeps them."""
    rows = sum(count for count, _ in members)
    placements: list[Placement] = []
    expected: list[int] = []
    stop = 0
    for count, is_kept in members:
        start, stop = stop, stop + count
        kept = ["z"] if is_kept else []
        placements.append(Placement(kept, Rows(start, stop, rows), nowhere, nothing))
        expected += [] if is_kept else range(8 * start, 8 * stop)
    spans = list(spans_for_host(placements, "z", 8 * rows))
    assert [byte for span in spans for byte in range(*span)] == expected
    assert all(start < stop for start, stop in spans)


@pytest.mark.parametrize("shape", [(), (4,), (6,)])
def test_a_result_without_the_rows_of_the_batch(shape: Shape) -> None:
    placement = Placement(["z"], Rows(0, 2, 5), nowhere, nothing)
    with pytest.raises(EngineError, match=r"output 'z' has the shape .* for a batch of 5 rows"):
        list(pieces_of(placement, OUTPUTS, {"z": shape}, SOURCES))


def test_who_runs_alone_gets_all_of_it_whatever_its_shape() -> None:
    placement = Placement(["z"], None, lambda own: {"z": 7}, nothing)
    (piece,) = pieces_of(placement, OUTPUTS, {"z": (4,)}, SOURCES)
    assert (piece.target, piece.source, piece.nbytes) == (7, SOURCES["z"], 32)


def test_results_without_room_are_dropped() -> None:
    placement = Placement(["z"], Rows(0, 1, 1), lambda own: None, nothing)
    assert list(pieces_of(placement, OUTPUTS, {"z": (1,)}, SOURCES)) == []
    none = Placement([], Rows(0, 1, 1), nowhere, nothing)
    assert list(pieces_of(none, OUTPUTS, {"z": (1,)}, SOURCES)) == []


def test_what_is_bound_where_it_lies() -> None:
    """Of a request alone: numbers that are no indices, and not what is on the host."""
    there = SimpleNamespace(address=512)
    specs = tuple(TensorSpec(name, BY_NAME[name], (-1,)) for name in ("FP16", "INT64", "BOOL"))
    host = TensorSpec("host", BY_NAME["FP32"], (-1,))
    inputs = {**{spec.name: there for spec in specs}, "host": np.ones(1, np.float32)}

    def bound(*placements: Placement) -> dict[str, Any]:
        request = Request(inputs, {}, 0, [], {}, placements=placements)
        return dict(request.bound_inputs([*specs, host]))

    assert bound(Placement([], None, nowhere, nothing, is_in_place=True)) == {"FP16": there}
    assert bound(Placement([], Rows(0, 1, 1), nowhere, nothing)) == {}
    assert bound() == {}
