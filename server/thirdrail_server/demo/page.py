# SPDX-License-Identifier: Apache-2.0
"""A page to read: known lines of text, rendered with the font that comes with Pillow."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

PAGE_WIDTH = 768
PAGE_HEIGHT = 640
MARGIN = 48
INK = (24, 24, 32)
PAPER = (252, 250, 245)


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    size: int  # of the letters, in pixels


LINES: tuple[Line, ...] = (
    Line("Thirdrail reads this page", 44),
    Line("Invoice 2026-0417, due in 30 days", 28),
    Line("3 copper busbars at 41.70 EUR", 28),
    Line("12 ceramic insulators at 6.25 EUR", 28),
    Line("Total: 200.10 EUR (incl. 19% VAT)", 28),
    Line("Questions? billing@example.org", 22),
    Line("The quick brown fox jumps over the lazy dog.", 18),
    Line("Sphinx of black quartz, judge my vow!", 18),
)


def render(lines: tuple[Line, ...] = LINES) -> npt.NDArray[np.uint8]:
    """The page as RGB pixels, shape [PAGE_HEIGHT, PAGE_WIDTH, 3]."""
    image = Image.new("RGB", (PAGE_WIDTH, PAGE_HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    top = MARGIN
    for line in lines:
        font = ImageFont.load_default(size=line.size)
        draw.text((MARGIN, top), line.text, fill=INK, font=font)
        top += 2 * line.size + 8
    assert top < PAGE_HEIGHT, "the lines do not fit the page"
    return np.asarray(image)
