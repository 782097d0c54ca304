# SPDX-License-Identifier: Apache-2.0
"""Tests of text_boxes.py on maps and pages drawn by hand."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail_server.demo.text_boxes import (
    Box,
    connected_regions,
    detection_input,
    find_boxes,
    normalised,
    reading_order,
)


def mask_of(*rows: str) -> npt.NDArray[np.bool_]:
    return np.array([[cell == "#" for cell in row] for row in rows])


def flood_fill_boxes(mask: npt.NDArray[np.bool_]) -> set[Box]:
    """The slow, obvious way to find the regions: spread from each cell that is not yet taken."""
    height, width = mask.shape
    taken: set[tuple[int, int]] = set()
    boxes = set()
    for start in zip(*np.nonzero(mask), strict=True):
        if start in taken:
            continue
        region, edge = {start}, [start]
        while edge:
            y, x = edge.pop()
            for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= cell[0] < height and 0 <= cell[1] < width
                if inside and mask[cell] and cell not in region:
                    region.add(cell)
                    edge.append(cell)
        taken |= region
        ys, xs = [y for y, _ in region], [x for _, x in region]
        boxes.add(Box(int(min(xs)), int(min(ys)), int(max(xs)) + 1, int(max(ys)) + 1))
    return boxes


@pytest.mark.parametrize(
    ("rows", "boxes"),
    [
        (["....", "...."], []),
        (["##..", "##.."], [Box(0, 0, 2, 2)]),
        (["#.#.", "#.#.", "###."], [Box(0, 0, 3, 3)]),  # two arms that meet further down
        (["#..#", ".##."], [Box(0, 0, 1, 1), Box(3, 0, 4, 1), Box(1, 1, 3, 2)]),  # corners only
        (["#....", "#.#.#", "#...#", "#####"], [Box(0, 0, 5, 4), Box(2, 1, 3, 2)]),  # one inside
        (["###", "..#", "###", "#..", "###"], [Box(0, 0, 3, 5)]),  # a snake
    ],
)
def test_regions(rows: list[str], boxes: list[Box]) -> None:
    assert connected_regions(mask_of(*rows)) == boxes


@given(
    st.integers(1, 8).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=8
        )
    )
)
def test_regions_are_those_of_a_flood_fill(rows: list[list[bool]]) -> None:
    mask = np.array(rows)
    found = connected_regions(mask)
    assert set(found) == flood_fill_boxes(mask)
    assert [box.top for box in found] == sorted(box.top for box in found)


def test_boxes_grow_back_to_the_text_and_scale_to_the_page() -> None:
    map_ = np.zeros((64, 64), dtype=np.float32)
    map_[20:30, 10:50] = 0.9
    # 10 high and 40 wide: the margin is 1.6 * 400 / 100 = 6.4 pixels. The page is twice as high as
    # the map and three times as wide.
    assert find_boxes(map_, 128, 192) == [Box(12, 28, 168, 72)]


def test_boxes_stay_on_the_page() -> None:
    map_ = np.full((32, 32), 0.9, dtype=np.float32)
    assert find_boxes(map_, 32, 32) == [Box(0, 0, 32, 32)]


def test_specks_and_faint_regions_are_no_text() -> None:
    map_ = np.zeros((32, 32), dtype=np.float32)
    map_[2:4, 2:20] = 0.9  # two pixels thin
    map_[10:20, 2:20] = 0.4  # above the pixel threshold, below that of a box
    assert find_boxes(map_, 32, 32) == []


def test_reading_order_is_by_line_and_then_from_the_left() -> None:
    title, left, right = Box(0, 0, 9, 10), Box(0, 22, 4, 32), Box(6, 20, 9, 30)
    assert reading_order([right, left, title]) == [title, left, right]


def test_input_sides_are_multiples_of_32() -> None:
    page = np.zeros((470, 333, 3), dtype=np.uint8)
    assert detection_input(page).shape == (1, 3, 480, 320)


def test_large_pages_are_reduced() -> None:
    page = np.zeros((3072, 1536, 3), dtype=np.uint8)
    assert detection_input(page).shape == (1, 3, 1536, 768)


def test_colours_are_blue_green_red_from_minus_one_to_one() -> None:
    orange = np.array([[[255, 51, 0]]], dtype=np.uint8)
    planes = normalised(orange)
    assert planes.dtype == np.float32
    assert planes.flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])
