# SPDX-License-Identifier: Apache-2.0
"""PP-OCR text detection: what goes into the model, and how its probability map becomes boxes.

The model (a DB detector: differentiable binarization) answers with one probability per pixel, and
it was trained to mark only the core of each line, so that neighbouring lines stay apart. Boxes are
therefore found in three steps: threshold the map, take each connected region, and grow its
rectangle back to the size of the text. The rectangles are upright: right for rendered pages and
scans, not for photographs at an angle.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SIDE_MULTIPLE = 32  # the network halves its input five times
SIDE_PIXELS_MAX = 1536
PIXEL_PROBABILITY_MIN = 0.3
BOX_PROBABILITY_MIN = 0.5
CORE_PIXELS_MIN = 3  # thinner regions are specks
GROWTH = 1.6  # margin added around a region, times its area over its circumference


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle in pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def detection_input(page: Pixels) -> Floats:
    """RGB pixels [height, width, 3] -> the model's input [1, 3, h, w], h and w multiples of 32."""
    height, width = page.shape[:2]
    scale = min(1.0, SIDE_PIXELS_MAX / max(height, width))
    size = (_to_multiple(width * scale), _to_multiple(height * scale))
    resized = Image.fromarray(page).resize(size, Image.Resampling.BILINEAR)
    return normalised(np.asarray(resized))[np.newaxis]


def normalised(pixels: Pixels) -> Floats:
    """RGB pixels [h, w, 3] -> blue, green and red planes from -1 to 1, [3, h, w]."""
    planes = pixels[:, :, ::-1].transpose(2, 0, 1)
    return np.ascontiguousarray(planes, dtype=np.float32) / np.float32(127.5) - np.float32(1)


def find_boxes(probabilities: Floats, page_height: int, page_width: int) -> list[Box]:
    """The model's map [h, w] -> the boxes of the text on the page, in reading order."""
    height, width = probabilities.shape
    boxes = []
    for core in connected_regions(probabilities > PIXEL_PROBABILITY_MIN):
        if min(core.right - core.left, core.bottom - core.top) < CORE_PIXELS_MIN:
            continue
        inside = probabilities[core.top : core.bottom, core.left : core.right]
        if inside.mean() >= BOX_PROBABILITY_MIN:
            boxes.append(_scaled(_grown(core), page_width / width, page_height / height))
    return reading_order([_clipped(box, page_height, page_width) for box in boxes])


def connected_regions(mask: npt.NDArray[np.bool_]) -> list[Box]:
    """The bounding boxes of the 4-connected True regions of a mask [h, w], from top to bottom.

    Works on runs of True within a row: a page of text has some thousand runs but a million pixels.
    Each run joins the runs of the row above that it touches, and a region is a set of joined runs.
    """
    regions: dict[int, Box] = {}  # by the number of their first run
    joined_to: list[int] = []  # per run: another run of its region, or itself

    def region_of(run: int) -> int:
        while joined_to[run] != run:
            joined_to[run] = joined_to[joined_to[run]]  # halves the way for the next search
            run = joined_to[run]
        return run

    above: list[tuple[int, int, int]] = []
    for row, spans in enumerate(_runs_by_row(mask)):
        current = []
        for left, right in spans:
            run = len(joined_to)
            joined_to.append(run)
            regions[run] = Box(left, row, right, row + 1)
            for above_left, above_right, above_run in above:
                if above_left < right and left < above_right:
                    first, other = sorted((region_of(above_run), region_of(run)))
                    if first != other:
                        joined_to[other] = first
                        regions[first] = _union(regions[first], regions.pop(other))
            current.append((left, right, run))
        above = current
    return list(regions.values())


def reading_order(boxes: list[Box]) -> list[Box]:
    """Line by line from the top, each from left to right.

    A box whose middle lies beside the first box of a line belongs to that line.
    """
    lines: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: box.top):
        middle = (box.top + box.bottom) / 2
        if lines and lines[-1][0].top <= middle < lines[-1][0].bottom:
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line, key=lambda box: box.left)]


def _to_multiple(side: float) -> int:
    return max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE


def _runs_by_row(mask: npt.NDArray[np.bool_]) -> Iterator[list[tuple[int, int]]]:
    """Per row the (start, end) of each stretch of True."""
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    for row in edges:
        starts, ends = np.flatnonzero(row == 1).tolist(), np.flatnonzero(row == -1).tolist()
        yield list(zip(starts, ends, strict=True))


def _union(a: Box, b: Box) -> Box:
    return Box(
        min(a.left, b.left), min(a.top, b.top), max(a.right, b.right), max(a.bottom, b.bottom)
    )


def _grown(core: Box) -> Box:
    width, height = core.right - core.left, core.bottom - core.top
    margin = round(GROWTH * width * height / (2 * (width + height)))
    return Box(core.left - margin, core.top - margin, core.right + margin, core.bottom + margin)


def _scaled(box: Box, x: float, y: float) -> Box:
    return Box(round(box.left * x), round(box.top * y), round(box.right * x), round(box.bottom * y))


def _clipped(box: Box, height: int, width: int) -> Box:
    return Box(max(0, box.left), max(0, box.top), min(width, box.right), min(height, box.bottom))
