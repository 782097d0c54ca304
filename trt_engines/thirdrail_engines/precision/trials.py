# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs that a graph accepts, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thirdrail.tensors import Array
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_errors import tidy
from thirdrail_engines.onnxruntime_session import open_session, spec_of
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.proof import TRIAL_BYTES_MAX, seeded_inputs

SEEDS = (0, 1, 2)
ROWS = 2

# As in proof.py: sizes of open dimensions and bounds for whole numbers that most models take.
_TRIALS = tuple((size, whole_max) for whole_max in (100, 1) for size in (32, 64, 8, 1))


@dataclass(frozen=True, slots=True)
class Trial:
    inputs: Mapping[str, Array]
    results: Sequence[Array]

    @property
    def name(self) -> str:
        shapes = (f"{n}={'x'.join(map(str, a.shape)) or 'one'}" for n, a in self.inputs.items())
        return " ".join(shapes)


def open_wide(path: Path) -> tuple[Any, EngineSpec]:
    """A session of one thread. Raises ModelFileError."""
    session = open_session(path, EngineOptions())
    return session, spec_of(path, session, Findings())


def trial_inputs(session: Any, spec: EngineSpec, seed: int, wanted: Sequence[str]) -> Trial | str:
    """The first seeded inputs that the graph takes, with its results; or why it takes none."""
    inputs = [tensor for tensor in spec.inputs if not tensor.optional]
    refusal = f"trial inputs would take more than {TRIAL_BYTES_MAX} bytes"
    for size, whole_max in _TRIALS:
        feed = seeded_inputs(inputs, ROWS, size=size, whole_max=whole_max, seed=seed)
        if feed is None:
            continue
        try:
            return Trial(feed, session.run(list(wanted), feed))
        except Exception as error:  # ONNX Runtime's own share no parent but Exception
            refusal = f"no seeded inputs were accepted: {tidy(str(error))}"
    return refusal
