# SPDX-License-Identifier: Apache-2.0
"""FP32 graphs in FP16 and BF16: what changes, what does not, and how far off it is."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from precision.conftest import (
    BF16,
    BFLOAT,
    BOTH,
    FLOAT,
    FP16,
    HALF,
    ROWS,
    WEIGHTS,
    Node,
    WriteModel,
    ignore,
    large_inside,
    perceptron,
    type_of,
)
from thirdrail_engines.plans import BuildError, Precision, Profile, ShapeRange
from thirdrail_engines.precision import convert


@BOTH
def test_inputs_and_outputs_stay_fp32_and_the_inside_does_not(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    told: list[tuple[str, int, int]] = []
    path = perceptron(write_model)
    made = convert(path, precision, folder, lambda *step: told.append(step))
    assert told == [("precision", done, 4) for done in range(5)]
    assert made.path == folder / f"m.{precision}.onnx"
    assert sorted(each.name for each in folder.iterdir()) == [made.path.name]
    onnx.checker.check_model(made.path, full_check=True)
    graph = onnx.load(made.path).graph
    low = HALF if precision is FP16 else BFLOAT
    assert [type_of(graph, name) for name in ("x", "y")] == [FLOAT, FLOAT]
    assert [type_of(graph, name) for name in ("w", "b", "h", "a")] == [low] * 4
    assert [value.name for value in (*graph.input, *graph.output)] == ["x", "y"]


@BOTH
def test_the_report_has_figures_for_every_output(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    report = convert(perceptron(write_model), precision, folder, ignore).report
    assert json.loads(json.dumps(report)) == report
    assert report["precision"] == str(precision)
    assert report["nodes"] == 3
    assert report["nodes_in_fp32"] == {}
    assert report["weights_bytes_converted"] == 8 * 8 * 2 + 8 * 2
    assert report["measured_with"] == [f"x=2x8 seed={seed}" for seed in range(3)]
    outputs: Any = report["outputs"]
    (figures,) = outputs
    assert figures["name"] == "y"
    low, high = (1e-5, 4e-3) if precision is FP16 else (1e-4, 3e-2)
    assert low < figures["max_abs"] < high
    assert figures["cosine"] > 0.999
    assert figures["compared"] == 3 * 2 * 8


@BOTH
def test_the_figures_are_those_of_the_rounding(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    """For one matrix product numpy does the same: factors and result rounded, sums in FP32."""
    nodes = [Node("MatMul", ["x", "w"], ["y"])]
    path = write_model(nodes, {"x": ROWS}, {"y": ROWS}, {"w": WEIGHTS})
    outputs: Any = convert(path, precision, folder, ignore).report["outputs"]
    low = np.float16 if precision is FP16 else ml_dtypes.bfloat16

    def rounded(array: Any) -> Any:
        return array.astype(low).astype(np.float32)

    errors = []
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((2, 8), dtype=np.float32)
        errors.append(np.abs(x @ WEIGHTS - rounded(rounded(x) @ rounded(WEIGHTS))).max())
    assert outputs[0]["max_abs"] == pytest.approx(max(errors), rel=1e-3)


def test_bf16_weights_are_rounded_once_and_from_fp32(write_model: WriteModel, folder: Path) -> None:
    weights = WEIGHTS * np.float32(1e-9)  # nothing, in FP16
    weights[0, 0] = 1e30
    path = write_model([Node("Mul", ["x", "w"], ["y"])], {"x": ROWS}, {"y": ROWS}, {"w": weights})
    graph = onnx.load(convert(path, BF16, folder, ignore).path).graph
    found = numpy_helper.to_array(next(t for t in graph.initializer if t.name == "w"))
    assert found.astype(np.float32).tolist() == (
        weights.astype(ml_dtypes.bfloat16).astype(np.float32).tolist()
    )


def test_bf16_raises_the_opset_to_one_that_has_it(write_model: WriteModel, folder: Path) -> None:
    made = convert(perceptron(write_model, 13), BF16, folder, ignore)
    assert onnx.load(made.path).opset_import[0].version == 22
    made = convert(perceptron(write_model, 13), FP16, folder, ignore)
    assert onnx.load(made.path).opset_import[0].version == 13


def test_what_is_near_the_end_of_fp16_stays_fp32_all_the_way(
    write_model: WriteModel, folder: Path
) -> None:
    made = convert(write_model(*large_inside(60_000)), FP16, folder, ignore)
    assert made.report["nodes_in_fp32"] == {"Mul": 1, "Neg": 1, "Div": 1}
    assert made.report["kept_for_their_range_count"] == 3
    outputs: Any = made.report["outputs"]
    assert outputs[0]["max_abs"] < 2e-3
    graph = onnx.load(made.path).graph
    # Not through FP16 from one of them to the next, where it would have become infinite.
    assert sum(node.op_type == "Cast" for node in graph.node) == 2


def test_what_is_far_from_it_does_not(write_model: WriteModel, folder: Path) -> None:
    made = convert(write_model(*large_inside(16)), FP16, folder, ignore)
    assert made.report["nodes_in_fp32"] == {}


def test_two_that_stay_fp32_may_read_one_value(write_model: WriteModel, folder: Path) -> None:
    nodes = [
        Node("Tanh", ["x"], ["h"]),
        Node("CumSum", ["h", "axis"], ["low"]),
        Node("CumSum", ["h", "axis"], ["high"], reverse=1),
        Node("Add", ["low", "high"], ["y"]),
    ]
    path = write_model(nodes, {"x": ROWS}, {"y": ROWS}, {"axis": np.array(1)})
    made = convert(path, FP16, folder, ignore)
    onnx.checker.check_model(made.path, full_check=True)
    assert made.report["nodes_in_fp32"] == {"CumSum": 2}


def test_what_tensorrt_does_not_take_in_bf16_stays_fp32(
    write_model: WriteModel, folder: Path
) -> None:
    nodes = [Node("HardSwish", ["x"], ["h"]), Node("Tanh", ["h"], ["y"])]
    path = write_model(nodes, {"x": ROWS}, {"y": ROWS})
    assert convert(path, BF16, folder, ignore).report["nodes_in_fp32"] == {"HardSwish": 1}
    assert convert(path, FP16, folder, ignore).report["nodes_in_fp32"] == {}


@BOTH
def test_bodies_are_converted_too(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    branches: dict[str, Any] = {
        f"{name}_branch": helper.make_graph(
            [
                Node("Constant", [], [f"{name}_c"], value_float=0.3),
                Node(operator, ["h", f"{name}_c"], [f"{name}_y"]),
            ],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", FLOAT, ["n", 8])],
        )
        for name, operator in (("then", "Mul"), ("else", "Add"))
    }
    nodes = [Node("Tanh", ["x"], ["h"]), Node("If", ["choice"], ["y"], **branches)]
    inputs = {"x": ROWS, "choice": (TensorProto.BOOL, [])}
    made = convert(write_model(nodes, inputs, {"y": ROWS}), precision, folder, ignore)
    outputs: Any = made.report["outputs"]
    assert 1e-6 < outputs[0]["max_abs"] < 1e-2


@BOTH
def test_scales_of_resize_stay_fp32(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    nodes = [Node("Resize", ["x", "", "scales"], ["y"], mode="nearest")]
    image = (FLOAT, ["n", 3, 8, 8])
    path = write_model(
        nodes,
        {"x": image},
        {"y": (FLOAT, ["n", 3, 16, 16])},
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    )
    made = convert(path, precision, folder, ignore)
    assert type_of(onnx.load(made.path).graph, "scales") == FLOAT


def test_weights_in_a_file_beside_the_graph(write_model: WriteModel, folder: Path) -> None:
    path = perceptron(write_model)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    made = convert(path, FP16, folder, ignore)
    assert made.report["outputs"]
    (path.parent / "w.bin").unlink()
    with pytest.raises(BuildError, match=r"m\.onnx: .*w\.bin"):
        convert(path, FP16, folder, ignore)


def test_the_shapes_of_a_profile_are_measured_with(write_model: WriteModel, folder: Path) -> None:
    profile = Profile({"x": ShapeRange((1, 8), (5, 8), (9, 8))})
    made = convert(perceptron(write_model), FP16, folder, ignore, [profile])
    assert made.report["measured_with"] == [f"x=5x8 seed={seed}" for seed in range(3)]


def test_a_graph_that_takes_no_seeded_input_is_converted_and_called_unmeasured(
    write_model: WriteModel, folder: Path
) -> None:
    nodes = [Node("MatMul", ["x", "w"], ["y"])]
    inputs = {"x": (FLOAT, ["n", "m"])}
    weights = np.ones((13, 4), np.float32)
    path = write_model(nodes, inputs, {"y": (FLOAT, ["n", 4])}, {"w": weights})
    report = convert(path, FP16, folder, ignore).report
    assert report["outputs"] == []
    assert str(report["not_measured_because"]).startswith("no seeded inputs were accepted: MatMul")
    assert str(report["ranges_unknown_because"]).startswith(
        "no seeded inputs were accepted: MatMul"
    )


def test_a_graph_whose_nodes_make_no_fp32_has_no_ranges(
    write_model: WriteModel, folder: Path
) -> None:
    nodes = [Node("NonZero", ["x"], ["y"])]
    path = write_model(nodes, {"x": ROWS}, {"y": (TensorProto.INT64, [2, "n"])})
    report = convert(path, FP16, folder, ignore).report
    assert report["ranges_unknown_because"] == report["not_measured_because"] == ""
    assert report["kept_for_their_range"] == []


@BOTH
def test_a_constant_may_be_an_output(
    write_model: WriteModel, folder: Path, precision: Precision
) -> None:
    """As the anchors of detectors are."""
    anchors = numpy_helper.from_array(np.array([0.1, 2, 3], np.float32))
    nodes = [Node("Constant", [], ["anchors"], value=anchors), Node("Neg", ["x"], ["y"])]
    path = write_model(nodes, {"x": ROWS}, {"y": ROWS, "anchors": (FLOAT, [3])})
    made = convert(path, precision, folder, ignore)
    onnx.checker.check_model(made.path, full_check=True)
    graph = onnx.load(made.path).graph
    assert [type_of(graph, name) for name in ("y", "anchors")] == [FLOAT, FLOAT]
