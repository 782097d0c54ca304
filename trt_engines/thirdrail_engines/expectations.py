# SPDX-License-Identifier: Apache-2.0
"""What a reference makes of seeded inputs: the half of a proof that needs no engine under proof.

The reference is ONNX Runtime on the CPU, with the model as it is, or PyTorch on the CPU, which runs
a program of torch.export operator by operator. Runs are computed one at a time, when they are asked
for: their arrays may be large.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.engine import Engine, EngineError
from thirdrail_engines.output_figures import is_float
from thirdrail_engines.plans import Profile
from thirdrail_engines.trials import KINDS, Trial, ValueRange, bytes_of, seeded, trials


class Reference(StrEnum):
    """Whose results count, both on the CPU."""

    ONNXRUNTIME = "onnxruntime"
    TORCH = "torch"  # of a `.pt2` file


@dataclass(frozen=True, slots=True)
class ProofLimits:
    """bytes_max: inputs of one run. seconds_max: of the reference's runs, and again of the
    engine's; after that, no further run is begun. kept_bytes_max: inputs and outputs of all runs,
    where a process hands them to another."""

    bytes_max: int = 256 << 20
    seconds_max: float = 30.0
    kept_bytes_max: int = 2 << 30


@dataclass(frozen=True, slots=True)
class ReferenceRequest:
    """What a process is asked to compute.

    source: the model. plan: what ONNX Runtime's builder made of it, to be run in its place; without
        one, the source itself is run: an ONNX file by ONNX Runtime, a `.pt2` file by PyTorch.
    times: how often the best shapes are run, on other inputs each time.
    """

    source: Path
    plan: Path | None
    profiles: tuple[Profile, ...]
    values: Mapping[str, ValueRange] = field(default_factory=dict)
    limits: ProofLimits = field(default_factory=ProofLimits)
    threads_max: int = 1
    times: int = 1


@dataclass(frozen=True, slots=True)
class Expectation:
    """One run of the reference. run: its name, "profile 0 best"."""

    run: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A run that there is not, and why."""

    reason: str


class Pace:
    """Whether there is time for another run, judged by what those before it took."""

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._bytes = 0

    def refusal(self, run_bytes: int, spent_s: float) -> str:
        """ "" if there is. run_bytes: of its inputs."""
        if not self._bytes or spent_s * (1 + run_bytes / self._bytes) <= self._seconds_max:
            return ""
        return f"more than {self._seconds_max:g} s in all"

    def note(self, run_bytes: int) -> None:
        self._bytes += run_bytes + 1  # some have no inputs


def expectations(
    reference: Engine,
    profiles: Sequence[Profile],
    values: Mapping[str, ValueRange],
    limits: ProofLimits,
    times: int = 1,
) -> Iterator[Expectation | Skipped]:
    """Runs of the reference on inputs that it takes.

    profiles: those of the plan; without any, sizes are tried until the reference takes one.
    values: by input, where seeded ones of any kind make no sense to the model.
    times: as in ReferenceRequest.
    """
    pace = Pace(limits.seconds_max)
    began_s = time.monotonic()
    for trial in trials(reference.spec, profiles, times):
        if refusal := pace.refusal(trial.bytes, time.monotonic() - began_s):
            yield Skipped(f"{trial.name}: {refusal}")
            continue
        found = _run(reference, trial, values, limits.bytes_max)
        if isinstance(found, Expectation):
            pace.note(trial.bytes)
        yield found


def _run(
    reference: Engine, trial: Trial, values: Mapping[str, ValueRange], bytes_max: int
) -> Expectation | Skipped:
    """Inputs that the reference takes and what it makes of them, or why there are none."""
    names = [tensor.name for tensor in reference.spec.outputs]
    refusal = ""
    unfinished: Expectation | None = None
    for shapes in trial.alternatives:
        if bytes_of(shapes) > bytes_max:
            refusal = refusal or f"inputs of more than {bytes_max} bytes"
            continue
        for whole_max, is_positive in KINDS:
            inputs = seeded(shapes, values, whole_max, is_positive=is_positive, seed=trial.seed)
            try:
                found = Expectation(trial.name, inputs, reference.run(inputs, names, {}))
            except EngineError as error:
                refusal = refusal or f"the reference refuses seeded inputs: {error}"
                continue
            if all(_says_something(array) for array in found.outputs.values()):
                return found
            unfinished = unfinished or found
    return unfinished or Skipped(f"{trial.name}: {refusal}")


def _says_something(result: Array) -> bool:
    return not is_float(result) or not result.size or bool(np.isfinite(result).any())
