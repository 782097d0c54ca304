# SPDX-License-Identifier: Apache-2.0
"""Magika content types: from the bytes of a file to the model's input, from its answer to a label.

The model looks at the first and the last kilobyte of a file. Each byte is one token, 0 to 255;
white space at the outer ends is dropped, and where a file is too short the rest is filled with a
padding token.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class MagikaConfig:
    """What the model's own config file says about its input and its answers."""

    beg_size: int  # tokens from the start of a file
    end_size: int  # tokens from its end
    block_size: int  # bytes read at each end, before white space is dropped
    padding_token: int
    labels: tuple[str, ...]  # of the classes, in order
    thresholds: dict[str, float]  # labels that need a higher score than the usual one
    threshold: float

    @classmethod
    def from_json(cls, text: str) -> "MagikaConfig":
        """Raises ValueError for a model that reads more of a file than its two ends."""
        config: dict[str, Any] = json.loads(text)
        if config["mid_size"] or config["use_inputs_at_offsets"]:
            raise ValueError("this Magika model also reads the middle of a file; expected v3")
        return cls(
            beg_size=config["beg_size"],
            end_size=config["end_size"],
            block_size=config["block_size"],
            padding_token=config["padding_token"],
            labels=tuple(config["target_labels_space"]),
            thresholds=config["thresholds"],
            threshold=config["medium_confidence_threshold"],
        )


@dataclass(frozen=True, slots=True)
class ContentType:
    label: str
    score: float  # 0 to 1
    is_sure: bool  # the score reaches the label's threshold


def tokens(content: bytes, config: MagikaConfig) -> Tokens:
    """The content of a file -> one row of the model's input, [beg_size + end_size]."""
    # White space is what bytes.strip takes for it: so it was when the model was trained.
    start = content[: config.block_size].lstrip()[: config.beg_size]
    end = content[-config.block_size :].rstrip()
    end = end[max(0, len(end) - config.end_size) :]
    row = np.full(config.beg_size + config.end_size, config.padding_token, dtype=np.int32)
    row[: len(start)] = np.frombuffer(start, dtype=np.uint8)
    row[len(row) - len(end) :] = np.frombuffer(end, dtype=np.uint8)
    return row


def content_type(scores: npt.NDArray[np.float32], config: MagikaConfig) -> ContentType:
    """One row of the model's answer [labels] -> the best label."""
    best = int(scores.argmax())
    label, score = config.labels[best], float(scores[best])
    return ContentType(label, score, score >= config.thresholds.get(label, config.threshold))
