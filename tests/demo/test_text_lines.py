# SPDX-License-Identifier: Apache-2.0
"""Tests of text_lines.py: strips, batches, and CTC answers written by hand."""

import numpy as np
import pytest

from thirdrail_server.demo.text_boxes import Box, Floats
from thirdrail_server.demo.text_lines import (
    alphabet,
    batches_by_width,
    decode,
    recognition_input,
)

CHARACTERS = alphabet("a\nb\nc")


def answer(classes: list[int], probability: float = 0.9) -> Floats:
    """What the model answers when it is this sure of these classes."""
    rest = (1 - probability) / (len(CHARACTERS) - 1)
    probabilities = np.full((len(classes), len(CHARACTERS)), rest, dtype=np.float32)
    probabilities[np.arange(len(classes)), classes] = probability
    return probabilities


def test_alphabet_begins_with_blank_and_ends_with_space() -> None:
    assert CHARACTERS == ["", "a", "b", "c", " "]


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([0, 0, 0], ""),
        ([1, 1, 1], "a"),
        ([1, 0, 1], "aa"),
        ([1, 1, 2, 0, 2, 4, 3], "abb c"),
        ([0, 4, 1, 4, 0], " a "),
    ],
)
def test_repeats_merge_and_blanks_vanish(classes: list[int], text: str) -> None:
    assert decode(answer(classes), CHARACTERS).text == text


def test_confidence_is_that_of_the_characters_alone() -> None:
    probabilities = np.concatenate([answer([0, 1], 0.5), answer([1, 2], 0.9)])
    # Read are "a", first seen with 0.5, and "b" with 0.9.
    assert decode(probabilities, CHARACTERS).confidence == pytest.approx(0.7)


def test_nothing_read_has_no_confidence() -> None:
    assert decode(answer([0, 0]), CHARACTERS).confidence == 0.0


def test_a_list_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="5 classes, the list 4"):
        decode(answer([1]), CHARACTERS[:-1])


def test_strip_keeps_the_proportions_and_is_padded_with_grey() -> None:
    page = np.full((100, 400, 3), 255, dtype=np.uint8)
    strip = recognition_input(page, Box(10, 20, 106, 44))  # 96 by 24 becomes 192 by 48
    assert strip.shape == (3, 48, 320)
    assert (strip[:, :, :192] == 1).all()
    assert (strip[:, :, 192:] == 0).all()


def test_strip_shows_the_box_and_nothing_else() -> None:
    page = np.zeros((100, 400, 3), dtype=np.uint8)
    page[20:44, 10:106] = 255
    assert (recognition_input(page, Box(10, 20, 106, 44))[:, :, :192] == 1).all()


def test_batches_hold_one_width_and_a_bounded_number() -> None:
    widths = [320, 640, 320, 320, 640]
    strips = [np.zeros((3, 48, width), dtype=np.float32) for width in widths]
    assert batches_by_width(strips, rows_max=2) == [[0, 2], [3], [1, 4]]
