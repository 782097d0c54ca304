# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs that a graph accepts, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_errors import tidy
from thirdrail_engines.onnxruntime_session import spec_of
from thirdrail_engines.plans import Profile
from thirdrail_engines.proof import TRIAL_BYTES_MAX, seeded_inputs

_LOG_NOTHING = 4  # errors come as exceptions

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


@dataclass(frozen=True, slots=True)
class Subject:
    """A graph in ONNX Runtime, and what it is fed."""

    session: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


def open_subject(path: Path, profiles: Sequence[Profile] = ()) -> Subject:
    """profiles: of the first, the best shapes are taken. Raises ModelFileError."""
    session = _open_session(path)
    spec = spec_of(path, session, Findings())
    given = profiles[0].inputs if profiles else {}
    inputs = (
        replace(tensor, shape=given[tensor.name].best) if tensor.name in given else tensor
        for tensor in spec.inputs
        if not tensor.optional
    )
    return Subject(session, tuple(inputs), tuple(tensor.name for tensor in spec.outputs))


def _open_session(path: Path) -> Any:
    """One thread, and nodes in the order of the file.

    ONNX Runtime's usual order puts off what measures a value, which then outlives its readers: 740
    MB in place of 108 MB for PP-OCR detection.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no parent but Exception
        raise ModelFileError(tidy(str(error), path.parent)) from None


def try_inputs(subject: Subject, seed: int, wanted: Sequence[str]) -> Trial | str:
    """The first seeded inputs that the graph takes, with its results; or why it takes none."""
    refusal = f"trial inputs would take more than {TRIAL_BYTES_MAX} bytes"
    for size, whole_max in _TRIALS:
        feed = seeded_inputs(subject.inputs, ROWS, size=size, whole_max=whole_max, seed=seed)
        if feed is None:
            continue
        try:
            # It takes no names for all of them.
            return Trial(feed, subject.session.run(list(wanted), feed)[: len(wanted)])
        except Exception as error:  # ONNX Runtime's own share no parent but Exception
            refusal = f"no seeded inputs were accepted: {tidy(str(error))}"
    return refusal
