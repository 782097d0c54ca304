# SPDX-License-Identifier: Apache-2.0
"""An engine is compared with the reference: what is right passes, what is damaged does not."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.engines import WatchedEngine
from support.models import constant, double, gather, identity, model, tensor
from support.perceptrons import (
    two_layers,
    with_outputs_swapped,
    with_rounded_weights,
    with_weight,
)
from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines import Engine, EngineError
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.expectations import ProofLimits
from thirdrail_engines.output_figures import OutputFigures, compare, figure_beside
from thirdrail_engines.plans import Precision, Profile
from thirdrail_engines.profiles import read_shape_range
from thirdrail_engines.reference_proof import (
    ReferenceProof,
    Tolerance,
    prove,
    tolerance_for,
)
from thirdrail_engines.trials import ValueRange, value_fault

OpenModel = Callable[[onnx.ModelProto], Engine]

TIGHT = Tolerance(max_rel=1e-3, mean_rel=1e-4, cosine=0.9999, equal=1.0)
ROWS = Profile({"x": read_shape_range("1x16,4x16,8x16")})


def test_the_same_model_is_proven_on_every_shape(open_model: OpenModel) -> None:
    engine, reference = open_model(two_layers()), open_model(two_layers())
    proof = prove(engine, reference, (ROWS,), TIGHT)
    assert proof.is_proven
    assert proof.runs == ("profile 0 best", "profile 0 smallest", "profile 0 largest")
    assert [(o.name, o.compared) for o in proof.outputs] == [("y", 104), ("z", 104), ("most", 13)]
    assert all(o.max_abs == 0 and o.cosine > 0.999999 and o.equal == 1 for o in proof.outputs)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda built: with_weight(built, "b", (3, 2), 9.0), "output 'y' has max_rel"),
        (lambda built: with_weight(built, "c", (0, 0), np.nan), "'z' has 13 elements that are NaN"),
        (lambda built: with_weight(built, "c", (0, 0), np.inf), "'z' has 13 elements that are NaN"),
        (with_outputs_swapped, "output 'y' has cosine"),
        (lambda built: two_layers(seed=1), "output 'most' has equal"),
        (lambda built: double(), "the engine has no output 'z', 'most'"),
    ],
    ids=["a weight", "a NaN", "an infinity", "swapped outputs", "other weights", "another model"],
)
def test_a_damaged_engine_is_caught(open_model: OpenModel, damage: Any, expected: str) -> None:
    proof = prove(open_model(damage(two_layers())), open_model(two_layers()), (ROWS,), TIGHT)
    assert not proof.is_proven
    assert any(expected in fault for fault in proof.faults), proof.faults


def test_rounding_passes_where_the_precision_allows_it(open_model: OpenModel) -> None:
    reference = open_model(two_layers())
    engine = open_model(with_rounded_weights(two_layers()))
    fp16 = tolerance_for(Precision.FP16, reference.spec, Tolerance())
    proof = prove(engine, reference, (ROWS,), fp16)
    assert proof.is_proven
    assert 0 < proof.outputs[0].max_rel < 1e-2
    # The figures are the same under other bounds; only the judgement changes.
    strict = proof.judged(Tolerance(max_abs=1e-9))
    assert strict.outputs == proof.outputs
    assert any("has max_abs" in fault and "allowed is 1e-09" in fault for fault in strict.faults)


@pytest.mark.parametrize(
    ("bound", "figure", "digits", "text"),
    [
        (0.1, 0.5, 3, "0.5"),
        (0.01, 0.010001, 3, "0.010001"),
        (1.0, 0.99999999, 6, "0.99999999"),
        (1.0, 1 - 2**-53, 6, "0.9999999999999999"),
        (0.01, float("nan"), 3, "nan"),
    ],
)
def test_a_figure_beyond_its_bound_does_not_look_like_it(
    bound: float, figure: float, digits: int, text: str
) -> None:
    """As in "has cosine 1, expected at least 1"."""
    assert figure_beside(bound, figure, digits) == text


def test_a_proof_survives_json(open_model: OpenModel) -> None:
    engine = open_model(with_weight(two_layers(), "c", (0, 0), np.inf))
    proof = prove(engine, open_model(two_layers()), (ROWS,), TIGHT)
    text = json.dumps(proof.to_dict(), allow_nan=False)
    assert ReferenceProof.from_dict(json.loads(text)) == proof


def test_without_profiles_sizes_are_tried_until_the_reference_takes_one(
    open_model: OpenModel,
) -> None:
    """Reshaped to rows of 8, so that one row of 1 is refused, and 32, 64 and 8 are not."""
    rows = constant("rows", np.array([-1, 8]))
    node = helper.make_node("Reshape", ["x", "rows"], ["y"])
    built = model(
        [node], [tensor("x", "FP32", ("n", "m"))], [tensor("y", "FP32", ("k", 8))], [rows]
    )
    proof = prove(open_model(built), open_model(built), (), TIGHT)
    assert proof.is_proven
    assert proof.runs == ("trial sizes", "trial sizes, one row")
    assert proof.outputs[0].compared == 32 * 32 + 32


def test_indices_are_found_that_the_reference_takes(open_model: OpenModel) -> None:
    profile = Profile({"index": read_shape_range("1,2,3")})
    proof = prove(open_model(gather()), open_model(gather()), (profile,), TIGHT)
    assert proof.is_proven


def test_logarithms_are_given_positive_numbers_and_text_is_compared(
    open_model: OpenModel,
) -> None:
    log = model(
        [helper.make_node("Log", ["x"], ["y"]), helper.make_node("IsNaN", ["y"], ["is_nan"])],
        [tensor("x", "FP32", (1,))],
        [tensor("y", "FP32", (1,)), tensor("is_nan", "BOOL", (1,))],
    )
    assert prove(open_model(log), open_model(log), (), TIGHT).is_proven
    text = identity("BYTES")
    assert prove(open_model(text), open_model(text), (), TIGHT).is_proven


@pytest.mark.parametrize("dtype", ["BF16", "FP16", "FP64", "UINT8", "BOOL", "BYTES"])
def test_every_kind_of_output_is_compared(open_model: OpenModel, dtype: str) -> None:
    built = identity(dtype)
    proof = prove(open_model(built), open_model(built), (), TIGHT)
    assert proof.is_proven
    assert proof.outputs[0].compared > 0


def test_what_the_reference_refuses_proves_nothing(open_model: OpenModel) -> None:
    """A table of 4 rows is never asked for row 0 or 1 alone if the index has a hundred added."""
    built = gather()
    built.graph.node[0].input[1] = "far"
    built.graph.node.insert(0, helper.make_node("Add", ["index", "hundred"], ["far"]))
    built.graph.initializer.append(constant("hundred", np.array([100])))
    proof = prove(open_model(built), open_model(built), (), TIGHT)
    assert not proof.is_proven
    assert "nothing could be compared: trial sizes: the reference refuses" in proof.faults[0]
    assert 'say which: parameters { key: "profile.0.index" value' in proof.faults[0]
    assert 'say which: parameters { key: "proof.INPUT" value' in proof.faults[0]
    assert ReferenceProof.from_dict(proof.to_dict()) == proof


@pytest.mark.parametrize("dtype", ["INT64", "FP32", "FP16", "UINT8", "BYTES"])
def test_values_that_the_model_takes_can_be_given(open_model: OpenModel, dtype: str) -> None:
    """A sampling rate of 215 or 216 is a row of a table, and no other number is."""
    nodes = [
        helper.make_node("Cast", ["rate"], ["number"], to=onnx.TensorProto.INT64),
        helper.make_node("Sub", ["number", "first"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["y"]),
    ]
    weights = [
        constant("first", np.array([215])),
        constant("table", np.array([0.5, 1.5], np.float32)),
    ]
    inputs = [tensor("rate", dtype, ("n",))]
    built = model(nodes, inputs, [tensor("y", "FP32", ("n",))], weights)
    engine = open_model(built)
    assert not prove(engine, engine, (), TIGHT).is_proven
    proof = prove(engine, engine, (), TIGHT, values={"rate": ValueRange(215, 216)})
    assert proof.is_proven


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("FP32", ValueRange(0.2, 0.7), ""),
        ("INT64", ValueRange(-5, 7), ""),
        ("BYTES", ValueRange(-5, 700), ""),
        ("INT64", ValueRange(0.2, 0.7), "there is no whole number from 0.2 to 0.7"),
        ("UINT8", ValueRange(0, 256), "0 to 256 is not within 0 to 255 of UINT8"),
        ("BOOL", ValueRange(-1, 1), "-1 to 1 is not within 0 to 1 of BOOL"),
    ],
)
def test_values_that_an_input_cannot_take(dtype: str, values: ValueRange, expected: str) -> None:
    assert value_fault(TensorSpec("x", BY_NAME[dtype], (1,)), values) == expected


def test_what_is_never_finite_proves_nothing(open_model: OpenModel) -> None:
    built = double()
    built.graph.initializer[0].CopyFrom(constant("two", np.array([np.nan], np.float32)))
    proof = prove(open_model(built), open_model(built), (), TIGHT)
    assert proof.faults == ("nothing could be compared: seeded inputs lead to no finite number",)


def never_positive(kind: str) -> onnx.ModelProto:
    """y = x, and z: the logarithm of -x * x, or the x that are above 9, of which there are none."""
    if kind == "NaN":
        nodes = [
            helper.make_node("Mul", ["x", "x"], ["squared"]),
            helper.make_node("Neg", ["squared"], ["negative"]),
            helper.make_node("Log", ["negative"], ["z"]),
        ]
    else:
        nodes = [
            helper.make_node("Greater", ["x", "nine"], ["is_large"]),
            helper.make_node("Compress", ["x", "is_large"], ["z"]),
        ]
    nodes.append(helper.make_node("Identity", ["x"], ["y"]))
    outputs = [tensor("y", "FP32", (4,)), tensor("z", "FP32", ("n",))]
    nine = constant("nine", np.array([9], np.float32))
    return model(nodes, [tensor("x", "FP32", (4,))], outputs, [nine])


@pytest.mark.parametrize("kind", ["NaN", "empty"])
def test_an_output_that_was_never_compared_is_named_and_may_be_allowed(
    open_model: OpenModel, kind: str
) -> None:
    built = open_model(never_positive(kind))
    proof = prove(built, built, (), TIGHT)
    assert [(each.name, each.compared) for each in proof.outputs] == [("y", 4), ("z", 0)]
    assert not proof.is_proven
    (fault,) = proof.faults
    assert fault.startswith("output 'z' was never compared: seeded inputs lead to no finite number")
    assert 'parameters { key: "proof.INPUT" value' in fault
    assert 'parameters { key: "tolerance.uncompared" value { string_value: "1" } }' in fault
    assert proof.judged(dataclasses.replace(TIGHT, uncompared=1)).is_proven
    assert not proof.judged(dataclasses.replace(TIGHT, uncompared=0)).is_proven


class Failing:
    """An engine that does not run."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(
        self, inputs: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        raise EngineError("out of device memory")

    def close(self) -> None:
        pass


def test_an_engine_that_fails_is_not_proven(open_model: OpenModel) -> None:
    reference = open_model(double())
    failing: Engine = Failing(reference.spec)
    proof = prove(failing, reference, (), TIGHT)
    assert proof.faults == ("trial sizes: out of device memory",)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (("FP16", (-1,)), "input 'x' is FP16 [-1], the reference's FP32 [32]"),
        (("FP32", (8,)), "input 'x' is FP32 [8], the reference's FP32 [32]"),
        (("FP32", (-1, -1)), "input 'x' is FP32 [-1, -1], the reference's FP32 [32]"),
    ],
)
def test_an_engine_that_takes_other_inputs_is_not_run(
    open_model: OpenModel, inputs: tuple[str, tuple[int, ...]], expected: str
) -> None:
    reference = open_model(double())
    dtype, shape = inputs
    tensors = (TensorSpec("x", BY_NAME[dtype], shape),)
    failing: Engine = Failing(dataclasses.replace(reference.spec, inputs=tensors))
    assert prove(failing, reference, (), TIGHT).faults == (f"trial sizes: {expected}",)
    more = (*reference.spec.inputs, TensorSpec("more", BY_NAME["FP32"], (1,)))
    failing = Failing(dataclasses.replace(reference.spec, inputs=more))
    assert prove(failing, reference, (), TIGHT).faults == (
        "trial sizes: the reference has no input 'more'",
    )


def test_bytes_and_time_are_bounded(open_model: OpenModel) -> None:
    reference = open_model(two_layers())
    few_bytes = prove(
        reference, reference, (ROWS,), TIGHT, limits=ProofLimits(bytes_max=4 * 16 * 4)
    )
    assert few_bytes.is_proven
    assert few_bytes.runs == ("profile 0 best", "profile 0 smallest")
    assert few_bytes.skipped == ("profile 0 largest: inputs of more than 256 bytes",)
    slow = WatchedEngine(reference)
    slow.sleep_s = 0.02
    assert prove(slow, reference, (ROWS,), TIGHT, limits=ProofLimits(seconds_max=300)).skipped == ()
    # 0.02 s for 4 rows and 0.02 s for one: 8 more would take 0.06 s.
    short = ProofLimits(seconds_max=0.07)
    assert "profile 0 largest" in prove(slow, reference, (ROWS,), TIGHT, limits=short).skipped[-1]
    no_time = prove(reference, reference, (ROWS,), TIGHT, limits=ProofLimits(seconds_max=0))
    assert no_time.is_proven
    assert no_time.runs == ("profile 0 best",)
    assert no_time.skipped[0] == "profile 0 smallest: more than 0 s in all"
    nothing = prove(reference, reference, (ROWS,), TIGHT, limits=ProofLimits(bytes_max=1))
    assert not nothing.is_proven


# One output


def fp32(*values: float) -> Array:
    return np.array(values, np.float32)


def test_figures_of_floats() -> None:
    figures = compare("y", fp32(1, 2, 4.5), fp32(1, 2, 4))
    assert (figures.max_abs, figures.max_rel, figures.compared) == (0.5, 0.125, 3)
    assert figures.mean_abs == pytest.approx(0.5 / 3)
    assert figures.mean_rel == pytest.approx(0.5 / 7)
    assert figures.cosine == pytest.approx(23 / np.sqrt(25.25 * 21))


def test_nans_and_infinities_must_be_the_same_ones() -> None:
    odd = fp32(1, np.nan, np.inf, -np.inf)
    assert compare("y", odd, odd).not_finite == 0
    assert compare("y", odd, odd).compared == 1
    assert compare("y", odd, odd[::-1].copy()).not_finite == 4
    assert compare("y", odd, fp32(1, np.inf, -np.inf, 2)).not_finite == 3


def test_figures_of_large_small_and_no_numbers() -> None:
    huge = np.array([1e300, -1e300])
    assert compare("y", huge, huge).cosine == pytest.approx(1)
    assert compare("y", -huge, huge).cosine == pytest.approx(-1)
    end = np.full(1000, np.finfo(np.float64).max)
    far = compare("y", -end, end)
    assert np.isfinite([far.max_abs, far.mean_abs, far.max_rel, far.mean_rel]).all()
    noise = fp32(1e-9, -1e-9)
    assert compare("y", noise, -noise).cosine == 1
    assert compare("y", noise, -noise).max_rel < 0.01
    assert compare("y", fp32(0, 0), fp32(1, 0)).cosine == 0
    assert compare("y", fp32(), fp32()) == OutputFigures("y")


def test_what_is_no_float_is_equal_or_not() -> None:
    left, right = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])
    assert compare("y", left, right) == OutputFigures("y", equal=0.75, compared=4)
    assert compare("y", left, left.astype(np.int32)).fault == (
        "is int64 [4], the reference int32 [4]"
    )
    assert compare("y", left, left[:3]).fault == "is int64 [4], the reference int64 [3]"


# Bounds


def spec(dtype: str) -> EngineSpec:
    tensors = (TensorSpec("x", BY_NAME[dtype], (1,)),)
    return EngineSpec(tensors, tensors, "onnxruntime_onnx", frozenset())


def test_bounds_follow_the_coarsest_format() -> None:
    bounds = [
        tolerance_for(precision, spec(dtype), Tolerance()).max_rel or 0
        for precision, dtype in [
            (Precision.AS_IS, "FP32"),
            (Precision.FP16, "FP32"),
            (Precision.AS_IS, "FP16"),
            (Precision.BF16, "FP32"),
            (Precision.FP16, "BF16"),
        ]
    ]
    assert bounds[0] < bounds[1] == bounds[2] < bounds[3] == bounds[4]


def test_what_is_asked_for_comes_first() -> None:
    asked = tolerance_for(Precision.AS_IS, spec("FP32"), Tolerance(cosine=0.5))
    assert (asked.cosine, asked.max_rel) == (0.5, 1e-2)
    # Who gives an absolute bound knows the size of the output: no relative one is in its way.
    absolute = tolerance_for(Precision.AS_IS, spec("FP32"), Tolerance(max_abs=3))
    assert (absolute.max_abs, absolute.max_rel, absolute.cosine) == (3, None, 0.9999)
