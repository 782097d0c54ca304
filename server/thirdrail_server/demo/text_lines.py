# SPDX-License-Identifier: Apache-2.0
"""PP-OCR text recognition: from a box on the page to the model's input, from its answer to text.

The model reads a strip 48 pixels high from left to right and answers, for every 8 pixels, how
likely each character is, or "blank": nothing new here (CTC). The text is the likeliest character of
every step with repetitions merged and blanks left out; two equal letters in a row always have a
blank between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from thirdrail_server.demo.text_boxes import Box, Floats, Pixels, normalised

STRIP_HEIGHT = 48
STRIP_WIDTH_MULTIPLE = 320  # padded to few widths, so that lines of unequal length share a batch
BLANK = 0


@dataclass(frozen=True, slots=True)
class ReadText:
    text: str
    confidence: float  # the mean probability of its characters, 0 to 1


def recognition_input(page: Pixels, box: Box) -> Floats:
    """The part of an RGB page [height, width, 3] in the box -> one row of input, [3, 48, width].

    The padding on the right is 0, a middle grey.
    """
    crop = page[box.top : box.bottom, box.left : box.right]
    width = max(1, round(STRIP_HEIGHT * crop.shape[1] / crop.shape[0]))
    strip = Image.fromarray(crop).resize((width, STRIP_HEIGHT), Image.Resampling.BILINEAR)
    padded = np.zeros((3, STRIP_HEIGHT, padded_width(width)), dtype=np.float32)
    padded[:, :, :width] = normalised(np.asarray(strip))
    return padded


def padded_width(width: int) -> int:
    return -(-width // STRIP_WIDTH_MULTIPLE) * STRIP_WIDTH_MULTIPLE


def batches_by_width(strips: Sequence[Floats], rows_max: int) -> list[list[int]]:
    """The indexes of the strips in groups of one width and at most `rows_max` members."""
    by_width: dict[int, list[int]] = {}
    for index, strip in enumerate(strips):
        by_width.setdefault(strip.shape[2], []).append(index)
    return [
        group[start : start + rows_max]
        for group in by_width.values()
        for start in range(0, len(group), rows_max)
    ]


def alphabet(characters: str) -> list[str]:
    """The character of each class: the blank, the model's own list (one per line), the space."""
    return ["", *characters.split("\n"), " "]


def decode(probabilities: Floats, characters: Sequence[str]) -> ReadText:
    """One row of the model's answer [steps, classes] -> the text.

    Raises ValueError when the answer has another number of classes than there are characters.
    """
    if probabilities.shape[1] != len(characters):
        raise ValueError(
            f"the model knows {probabilities.shape[1]} classes, the list {len(characters)}"
        )
    classes = probabilities.argmax(axis=1)
    is_new = np.append(True, classes[1:] != classes[:-1])
    kept = np.flatnonzero(is_new & (classes != BLANK))
    text = "".join(characters[index] for index in classes[kept])
    confidence = float(probabilities[kept, classes[kept]].mean()) if len(kept) else 0.0
    return ReadText(text, confidence)
