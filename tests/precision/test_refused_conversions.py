# SPDX-License-Identifier: Apache-2.0
"""Graphs that are not converted, and what is said of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from precision.conftest import (
    BF16,
    FLOAT,
    FP16,
    HALF,
    INT64,
    ROWS,
    Node,
    WriteModel,
    ignore,
    large_inside,
    perceptron,
)
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.precision import convert


def test_a_result_that_fp16_cannot_hold_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, write_model: WriteModel, refused: Callable[..., str]
) -> None:
    """As if the seeded inputs had not shown how large it gets."""
    from thirdrail_engines.precision import conversion

    monkeypatch.setattr(conversion, "FP16_MAGNITUDE_MAX", 1e30)
    assert "elements of output 'y' are infinite or NaN where FP32 has numbers: use bf16" in refused(
        write_model(*large_inside(60_000))
    )


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


def test_weights_that_no_message_carries_are_refused(
    monkeypatch: pytest.MonkeyPatch, write_model: WriteModel, refused: Callable[..., str]
) -> None:
    from thirdrail_engines.precision import conversion

    monkeypatch.setattr(conversion, "WEIGHTS_BYTES_MAX", 200)
    assert "the graph has 288 bytes of weights, at most 200 are converted" in refused(
        perceptron(write_model)
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
