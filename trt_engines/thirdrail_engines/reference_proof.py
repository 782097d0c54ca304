# SPDX-License-Identifier: Apache-2.0
"""The proof that an engine computes what its model says: it must agree with a reference.

Both run on the same seeded inputs, of the shapes that the plan was built for: best, smallest and
largest. What differs is measured per output, over all runs, as the worst that was seen.

Errors are judged relative to the size of the output, since a model of logits near 1000 and one of
probabilities may be equally right; whoever knows better configures absolute bounds. Defaults follow
from the format that the graph computes in, whose rounding error u bounds what one operation can
lose: FP32 on a GPU multiplies in TF32 (u = 2^-11), so its row is no tighter than that times a few;
FP16 has the same u but also stores every activation in it; BF16 has u = 2^-8, eight times that. A
cosine near 1 says that no part of the output is turned away or swapped, whatever its scale.
Damage is far outside: outputs in the wrong order have a relative error near 1.
What was seen: seven models in real use (texts in images, speech, file types), converted to FP16 and
run on the CPU, were off by up to 2.9 % of the largest magnitude and 3.8 % of the mean, with cosines
above 0.9999.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Self

from thirdrail.dtypes import dtype_of_array
from thirdrail.tensors import Array
from thirdrail_engines.engine import Engine, EngineError, EngineSpec
from thirdrail_engines.expectations import (
    Expectation,
    Pace,
    ProofLimits,
    Reference,
    Skipped,
    expectations,
)
from thirdrail_engines.output_figures import OutputFigures, compare, figure_beside, worse
from thirdrail_engines.plans import Precision, Profile
from thirdrail_engines.profiles import config_line, profile_lines, suggested_ranges
from thirdrail_engines.trials import ValueRange

# Changes when inputs or figures are made in another way: older records then prove nothing.
PROOF_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an engine may be from the reference. None: not asked, or the default's."""

    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None  # as a part of the largest magnitude of the output
    mean_rel: float | None = None  # as a part of its mean magnitude
    cosine: float | None = None  # at least
    equal: float | None = None  # of whole numbers, booleans and text, at least this part
    uncompared: int | None = None  # so many outputs may be without any number to compare


@dataclass(frozen=True, slots=True)
class ReferenceProof:
    """faults: why the engine is not proven, for people; none: it is."""

    outputs: tuple[OutputFigures, ...]
    runs: tuple[str, ...]  # "profile 0 best", ...
    skipped: tuple[str, ...] = ()  # with the reason
    failed: str = ""  # the run that the engine failed, and how; or why there was no reference
    faults: tuple[str, ...] = ()
    # What to write where the sizes that were tried do not suit the model; "" where it was said.
    shapes_advice: str = ""
    reference: Reference = Reference.ONNXRUNTIME

    @property
    def uncompared(self) -> tuple[str, ...]:
        """The outputs of which no run had anything to compare: all NaN, or empty."""
        return tuple(
            each.name
            for each in self.outputs
            if not (each.compared or each.not_finite or each.fault)
        )

    @property
    def is_proven(self) -> bool:
        return not self.faults

    def judged(self, tolerance: Tolerance) -> Self:
        """The same figures under these bounds."""
        return dataclasses.replace(self, faults=tuple(_faults(self, tolerance)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; all numbers are finite."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything that `to_dict` did not write."""
        return cls(
            outputs=tuple(_read_figures(figures) for figures in values["outputs"]),
            runs=tuple(values["runs"]),
            skipped=tuple(values["skipped"]),
            failed=str(values["failed"]),
            faults=tuple(values["faults"]),
            # Older records do not have these.
            shapes_advice=str(values.get("shapes_advice", "")),
            reference=Reference(values.get("reference", Reference.ONNXRUNTIME)),
        )


def _read_figures(values: Mapping[str, Any]) -> OutputFigures:
    for key, value in values.items():
        if not isinstance(value, str) and not (type(value) in (int, float) and isfinite(value)):
            raise ValueError(f"{key} is no finite number")
        if isinstance(value, str) != (key in ("name", "fault")):
            raise TypeError(f"{key} is of the wrong type")
    return OutputFigures(**values)


def tolerance_for(precision: Precision, spec: EngineSpec, asked: Tolerance) -> Tolerance:
    """The bounds for an engine: what was asked for, else the default of its coarsest format.

    A bound that is asked for as a difference takes the place of the default relative one.
    """
    formats = {tensor.dtype.name for tensor in (*spec.inputs, *spec.outputs)}
    if precision is Precision.BF16 or "BF16" in formats:
        default = _BF16
    elif precision is Precision.FP16 or "FP16" in formats:
        default = _FP16
    else:
        default = _FP32
    is_absolute = asked.max_abs is not None or asked.mean_abs is not None
    if is_absolute:
        default = dataclasses.replace(default, max_rel=None, mean_rel=None)
    given = {key: value for key, value in dataclasses.asdict(asked).items() if value is not None}
    return dataclasses.replace(default, **given)


_FP32 = Tolerance(max_rel=1e-2, mean_rel=1e-2, cosine=0.9999, equal=0.999)
_FP16 = Tolerance(max_rel=5e-2, mean_rel=5e-2, cosine=0.999, equal=0.99)
_BF16 = Tolerance(max_rel=2e-1, mean_rel=2e-1, cosine=0.99, equal=0.95)


def prove(
    engine: Engine,
    reference: Engine,
    profiles: Sequence[Profile],
    tolerance: Tolerance,
    *,
    values: Mapping[str, ValueRange] | None = None,
    limits: ProofLimits | None = None,
) -> ReferenceProof:
    """Run both here, in turns, and compare. See `expectations` and `compare_runs`."""
    bounds = limits or ProofLimits()
    runs = expectations(reference, profiles, values or {}, bounds, times_for(engine.spec))
    return compare_runs(
        engine, reference.spec, runs, tolerance, bounds, has_profiles=bool(profiles)
    )


def times_for(spec: EngineSpec) -> int:
    """How often an engine is run with its best shapes, on other inputs each time.

    On a device, new shapes go by the library's own call first, the second run may be recorded, and
    the third is what requests get from then on.
    """
    return 3 if spec.overlapped_runs else 1


def compare_runs(
    engine: Engine,
    spec: EngineSpec,
    expected: Iterable[Expectation | Skipped],
    tolerance: Tolerance,
    limits: ProofLimits,
    *,
    has_profiles: bool,
) -> ReferenceProof:
    """Run the engine on the same inputs. What it does wrong is in the result; only DeviceLost is
    raised.

    spec: the reference's. has_profiles: whether the sizes were said, and not tried.
    """
    names = [tensor.name for tensor in spec.outputs]
    known = {tensor.name for tensor in engine.spec.outputs}
    lacking = [name for name in names if name not in known]
    if lacking:
        return unproven(f"the engine has no output {', '.join(map(repr, lacking))}", tolerance)
    worst = {name: OutputFigures(name) for name in names}
    runs: list[str] = []
    skipped: list[str] = []
    pace, spent_s = Pace(limits.seconds_max), 0.0
    for each in expected:
        if isinstance(each, Skipped):
            skipped.append(each.reason)
            continue
        run_bytes = sum(array.nbytes for array in each.inputs.values())
        if refusal := pace.refusal(run_bytes, spent_s):
            skipped.append(f"{each.run}: {refusal}")
            continue
        if fault := _input_fault(engine.spec, each.inputs):
            return unproven(f"{each.run}: {fault}", tolerance, tuple(runs), tuple(skipped))
        began_s = time.monotonic()
        try:
            got = engine.run(each.inputs, names, {})
        except EngineError as error:
            return unproven(f"{each.run}: {error}", tolerance, tuple(runs), tuple(skipped))
        for name in names:
            worst[name] = worse(worst[name], compare(name, got[name], each.outputs[name]))
        runs.append(each.run)
        pace.note(run_bytes)
        spent_s += time.monotonic() - began_s
    advice = "" if has_profiles else _shapes_advice(spec)
    proof = ReferenceProof(tuple(worst.values()), tuple(runs), tuple(skipped), shapes_advice=advice)
    return proof.judged(tolerance)


def _input_fault(spec: EngineSpec, inputs: Mapping[str, Array]) -> str:
    """Engines take what they are given for what their spec says: a reference may differ."""
    for tensor in spec.inputs:
        array = inputs.get(tensor.name)
        if array is None:
            if not tensor.optional:
                return f"the reference has no input '{tensor.name}'"
            continue
        fits = tensor.name in spec.unranked or (
            len(array.shape) == len(tensor.shape)
            and all(
                wanted in (-1, dim) for dim, wanted in zip(array.shape, tensor.shape, strict=True)
            )
        )
        if not fits or dtype_of_array(array) is not tensor.dtype:
            return (
                f"input '{tensor.name}' is {tensor.dtype.name} {list(tensor.shape)}, the "
                f"reference's {dtype_of_array(array).name} {list(array.shape)}"
            )
    return ""


def _shapes_advice(spec: EngineSpec) -> str:
    open_inputs = [tensor for tensor in spec.inputs if not tensor.optional and -1 in tensor.shape]
    if not open_inputs:
        return ""
    lines = profile_lines(0, suggested_ranges(open_inputs, None, frozenset()))
    return f"for inputs of certain sizes only, say which: {lines}; "


def unproven(
    failed: str,
    tolerance: Tolerance,
    runs: tuple[str, ...] = (),
    skipped: tuple[str, ...] = (),
) -> ReferenceProof:
    """failed: why there is nothing to judge."""
    return ReferenceProof((), runs, skipped, failed).judged(tolerance)


_ADVICE = "for an input that takes certain values only, say which: " + config_line(
    "proof.INPUT", "0..7"
)


def _faults(proof: ReferenceProof, tolerance: Tolerance) -> Iterator[str]:
    if proof.failed:
        yield proof.failed
    elif not proof.runs:
        more = f" (and {len(proof.skipped) - 1} more like it)" if proof.skipped[1:] else ""
        advice = f"{proof.shapes_advice}{_ADVICE}"
        yield f"nothing could be compared: {'; '.join(proof.skipped[:1])}{more}; {advice}"
    elif len(proof.uncompared) == len(proof.outputs):
        yield "nothing could be compared: seeded inputs lead to no finite number"
    elif len(proof.uncompared) > (tolerance.uncompared or 0):
        yield _uncompared_fault(proof.uncompared)
    for output in proof.outputs:
        for fault in _output_faults(output, tolerance):
            yield f"output '{output.name}' {fault}"


def _uncompared_fault(names: Sequence[str]) -> str:
    which = ", ".join(f"'{name}'" for name in names)
    subject = f"outputs {which} were" if names[1:] else f"output {which} was"
    return (
        f"{subject} never compared: seeded inputs lead to no finite number there; {_ADVICE}; or "
        f"do without: {config_line('tolerance.uncompared', str(len(names)))}"
    )


def _output_faults(output: OutputFigures, tolerance: Tolerance) -> Iterator[str]:
    if output.fault:
        yield output.fault
        return
    if output.not_finite:
        yield f"has {output.not_finite} elements that are NaN or infinite on one side only"
    for key in ("max_abs", "mean_abs", "max_rel", "mean_rel"):
        bound, figure = getattr(tolerance, key), getattr(output, key)
        if bound is not None and not figure <= bound:  # a NaN is never within
            yield f"has {key} {figure_beside(bound, figure, 3)}, allowed is {bound:.15g}"
    for key in ("cosine", "equal"):
        bound, figure = getattr(tolerance, key), getattr(output, key)
        if bound is not None and not figure >= bound:
            yield f"has {key} {figure_beside(bound, figure, 6)}, expected at least {bound:.15g}"
