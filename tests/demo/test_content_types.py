# SPDX-License-Identifier: Apache-2.0
"""Tests of content_types.py with a small config of the same form as Magika's."""

import dataclasses
import json

import numpy as np
import pytest

from thirdrail_server.demo.content_types import MagikaConfig, content_type, tokens

PADDING = 256
CONFIG_JSON = {
    "beg_size": 4,
    "mid_size": 0,
    "end_size": 4,
    "use_inputs_at_offsets": False,
    "medium_confidence_threshold": 0.5,
    "padding_token": PADDING,
    "block_size": 8,
    "target_labels_space": ["css", "sql"],
    "thresholds": {"sql": 0.9},
}
CONFIG = MagikaConfig.from_json(json.dumps(CONFIG_JSON))


@pytest.mark.parametrize(
    ("content", "start", "end"),
    [
        (b"abcdefghijkl", b"abcd", b"ijkl"),
        (b"ab", b"ab", b"ab"),
        (b"", b"", b""),
        (b"\v\fab \n", b"ab \n", b"\v\fab"),  # each end is stripped on its own side only
        (b" \t\r\n\v\fab", b"ab", b"\v\fab"),
        (b"         abcd", b"", b"abcd"),  # white space fills the first block
        (b"\x00\xa0\x85", b"\x00\xa0\x85", b"\x00\xa0\x85"),  # white space in ASCII only
    ],
)
def test_tokens_are_the_stripped_ends(content: bytes, start: bytes, end: bytes) -> None:
    expected = [*start, *[PADDING] * (4 - len(start)), *[PADDING] * (4 - len(end)), *end]
    row = tokens(content, CONFIG)
    assert row.dtype == np.int32
    assert row.tolist() == expected


def test_best_label_wins() -> None:
    found = content_type(np.array([0.6, 0.4], dtype=np.float32), CONFIG)
    assert found.label == "css"
    assert found.score == pytest.approx(0.6)
    assert found.is_sure


def test_a_label_with_a_threshold_of_its_own_needs_that_score() -> None:
    assert not content_type(np.array([0.2, 0.8], dtype=np.float32), CONFIG).is_sure
    assert content_type(np.array([0.05, 0.95], dtype=np.float32), CONFIG).is_sure


def test_a_config_of_another_generation_is_refused() -> None:
    with pytest.raises(ValueError, match="middle of a file"):
        MagikaConfig.from_json(json.dumps({**CONFIG_JSON, "mid_size": 512}))


def test_one_end_may_be_left_out() -> None:
    only_start = dataclasses.replace(CONFIG, end_size=0)
    assert tokens(b"abcdefghijkl", only_start).tolist() == list(b"abcd")
