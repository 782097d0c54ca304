# SPDX-License-Identifier: Apache-2.0
"""FP32 graphs in FP16 and BF16: what changes, what does not, how far off, and what is refused."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines.plans import BuildError, BuildFault, Precision, Profile, ShapeRange
from thirdrail_engines.precision import convert

FLOAT, HALF, BFLOAT, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
)
FP16, BF16 = Precision.FP16, Precision.BF16
BOTH = pytest.mark.parametrize("precision", [FP16, BF16], ids=str)
Node = helper.make_node
ROWS = (FLOAT, ["n", 8])
WEIGHTS = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)

Values = Mapping[str, tuple[int, Sequence[int | str]]]
WriteModel = Callable[..., Path]


def ignore(*_: Any) -> None:
    pass


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """write_model(nodes, inputs, outputs, constants) -> the path of the ONNX file."""

    def write(
        nodes: Sequence[Any],
        inputs: Values,
        outputs: Values,
        constants: Mapping[str, Any] | None = None,
        opset: int = 17,
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        )
        opsets = [helper.make_opsetid("", opset)]
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx"
        )
        return tmp_path / "m.onnx"

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def refused(folder: Path) -> Callable[..., str]:
    """Why a graph was not converted."""

    def fail(path: Path, precision: Precision = FP16) -> str:
        with pytest.raises(BuildError) as caught:
            convert(path, precision, folder, ignore)
        assert caught.value.fault is BuildFault.REFUSED
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return fail


def perceptron(write_model: WriteModel, opset: int = 17) -> Path:
    nodes = [
        Node("MatMul", ["x", "w"], ["h"]),
        Node("Add", ["h", "b"], ["a"]),
        Node("Tanh", ["a"], ["y"]),
    ]
    constants = {"w": WEIGHTS, "b": np.full(8, 1 / 3, np.float32)}
    return write_model(nodes, {"x": ROWS}, {"y": ROWS}, constants, opset)


def type_of(graph: Any, name: str) -> int:
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return int(types[name])


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


def large_inside(factor: float) -> tuple[Any, ...]:
    """x, made larger by `factor` on the way to a result that is as small again, in three steps."""
    nodes = [
        Node("Mul", ["x", "factor"], ["large"]),
        Node("Neg", ["large"], ["larger"]),
        Node("Div", ["larger", "factor"], ["small"]),
        Node("Neg", ["small"], ["y"]),
    ]
    return nodes, {"x": ROWS}, {"y": ROWS}, {"factor": np.array(factor, np.float32)}


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


def test_a_result_that_fp16_cannot_hold_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, write_model: WriteModel, refused: Callable[..., str]
) -> None:
    """As if the seeded inputs had not shown how large it gets."""
    from thirdrail_engines.precision import conversion

    monkeypatch.setattr(conversion, "FP16_MAGNITUDE_MAX", 1e30)
    assert "elements of output 'y' are infinite or NaN where FP32 has numbers: use bf16" in refused(
        write_model(*large_inside(60_000))
    )


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


def test_a_body_that_the_converter_breaks_is_refused(
    write_model: WriteModel, refused: Callable[..., str]
) -> None:
    """It puts casts for a body's own values outside of the body."""
    result = [helper.make_tensor_value_info("inner_y", FLOAT, ["n", 8])]
    body = [Node("Neg", ["x"], ["inner"]), Node("CumSum", ["inner", "axis"], ["inner_y"])]
    branch = helper.make_graph(body, "branch", [], result)
    other = helper.make_graph([Node("Identity", ["x"], ["other_y"])], "other", [], [])
    other.output.append(helper.make_tensor_value_info("other_y", FLOAT, ["n", 8]))
    node = Node("If", ["choice"], ["y"], then_branch=branch, else_branch=other)
    inputs = {"x": ROWS, "choice": (TensorProto.BOOL, [])}
    path = write_model([node], inputs, {"y": ROWS}, {"axis": np.array(1)})
    assert "its conversion to fp16 gives no valid graph: " in refused(path)


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


def test_weights_that_no_message_carries_are_refused(
    monkeypatch: pytest.MonkeyPatch, write_model: WriteModel, refused: Callable[..., str]
) -> None:
    from thirdrail_engines.precision import conversion

    monkeypatch.setattr(conversion, "WEIGHTS_BYTES_MAX", 200)
    assert "the graph has 288 bytes of weights, at most 200 are converted" in refused(
        perceptron(write_model)
    )


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


def test_what_has_a_precision_already_is_refused(
    write_model: WriteModel, refused: Callable[..., str]
) -> None:
    half = (HALF, ["n"])
    path = write_model([Node("Neg", ["x"], ["y"])], {"x": half}, {"y": half})
    assert "the graph has FP16 or BF16 tensors, so somebody chose its precision" in refused(path)
    whole = (INT64, ["n"])
    path = write_model([Node("Neg", ["x"], ["y"])], {"x": whole}, {"y": whole})
    assert refused(path) == "m.onnx: the graph has no FP32 tensors, nothing to convert to fp16"
    nodes = [
        Node("QuantizeLinear", ["x", "scale"], ["q"]),
        Node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    path = write_model(nodes, {"x": ROWS}, {"y": ROWS}, {"scale": np.array(0.1, np.float32)})
    assert "m.onnx: the graph is quantised (QuantizeLinear)" in refused(path, BF16)


def test_what_is_no_graph_is_refused(
    tmp_path: Path, folder: Path, refused: Callable[..., str], write_model: WriteModel
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    assert refused(tmp_path / "m.onnx").startswith("m.onnx: not a readable ONNX file")
    path = write_model([Node("Nope", ["x"], ["y"])], {"x": ROWS}, {"y": ROWS})
    assert "Nope" in refused(path)
    with pytest.raises(BuildError, match=r"n\.onnx: no file n\.onnx") as caught:
        convert(tmp_path / "n.onnx", FP16, folder, ignore)
    assert caught.value.fault is BuildFault.MISSING


# Of the largest magnitude of an output; about twice what was measured.
REL_MAX = {
    "magika": (4e-3, 2e-2),
    "ocr_detection": (4e-2, 0.4),
    "ocr_recognition": (6e-2, 0.3),
    "ocr_orientation": (6e-3, 5e-2),
    "silero_vad_half": (8e-3, 6e-2),
    "silero_vad_ifless": (2e-2, 7e-2),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(REL_MAX))
@BOTH
def test_real_models_stay_near_themselves(folder: Path, name: str, precision: Precision) -> None:
    from support.plan_models import plan_models

    model = plan_models()[name]
    report = convert(model.path, precision, folder, ignore, [model.profile]).report
    outputs: Any = report["outputs"]
    assert outputs
    assert report["not_measured_because"] == ""
    rel_max = REL_MAX[name][0 if precision is FP16 else 1]
    for output in outputs:
        assert rel_max / 100 < output["max_rel"] < rel_max
        assert output["cosine"] > (0.9999 if precision is FP16 else 0.996)
        assert output["not_finite"] == 0
        assert output["compared"] > 0
    if name == "magika":  # whose normalisation reaches 150,000
        assert precision is BF16 or report["kept_for_their_range_count"] == 9


@pytest.mark.needs_tensorrt
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["magika", "ocr_detection", "ocr_recognition", "silero_vad_ifless"]
)
@BOTH
def test_converted_models_become_smaller_plans(
    folder: Path, name: str, precision: Precision
) -> None:
    """What TensorRT for RTX takes in FP32, it takes in both."""
    from support.plan_models import plan_models
    from thirdrail_engines.builds import BuildLimits, run_build
    from thirdrail_engines.plans import Builder, PlanRequest
    from thirdrail_engines.tensorrt import installed_builders

    model = plan_models()[name]
    version = dict(installed_builders())[Builder.TENSORRT_RTX]
    sizes = []
    for each in (Precision.AS_IS, precision):
        request = PlanRequest(
            model.path, Builder.TENSORRT_RTX, version, each, (model.profile,), ("sm86",)
        )
        place = folder / str(each)
        place.mkdir()
        limits = BuildLimits(memory_bytes_max=1 << 30)
        built = run_build(request, place, limits, ignore, threading.Event())
        sizes.append(built.plan.stat().st_size)
    conversion: Any = built.conversion
    assert conversion["precision"] == str(precision)
    # Silero's plan is kernels for the most part, and those for recurrences do not shrink.
    assert sizes[1] < (0.8 if name != "silero_vad_ifless" else 1.1) * sizes[0]
