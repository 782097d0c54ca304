# SPDX-License-Identifier: Apache-2.0
"""Files that cannot be served: each gets a reason that its owner can act on."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from thirdrail_engines import (
    EngineOptions,
    Inspector,
    ModelFileError,
    load,
    onnxruntime_session,
)

FLOAT = TensorProto.FLOAT
Node = helper.make_node
WriteModel = Callable[..., Path]
BuildModel = Callable[..., Any]
VALUE = {"x": (FLOAT, ["n"])}


@pytest.fixture
def reason(inspector: Inspector) -> Callable[[Path], str]:
    """Why a file was refused."""

    def load_and_fail(path: Path) -> str:
        with pytest.raises(ModelFileError) as caught:
            load(path, options=EngineOptions(), inspector=inspector)
        return str(caught.value)

    return load_and_fail


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.onnx", b"", "a.onnx: the file is empty"),
        ("a.onnx", random.Random(0).randbytes(5000), "a.onnx: not a readable ONNX file"),
        ("a.onnx", b"\x08\x0a", "a.onnx: "),
        ("a.plan", b"x", "a.plan: no TensorRT plan by its first bytes; here: "),
        # Of one engine where PyTorch is not installed, of two where it is.
        pytest.param("a.pt2", b"x", "a.pt2", marks=pytest.mark.slow),
        ("a.pt", b"x", "a.pt"),
        ("model.py", b"x", "model.py: Python models are not served, expected model.onnx, model.pt"),
        ("model.bin", b"x", "model.bin: unknown kind of model file, expected model.onnx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_no_use(
    tmp_path: Path, reason: Callable[[Path], str], name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    text = reason(tmp_path / name)
    assert text.startswith(expected)
    assert_presentable(text, tmp_path)


def test_files_beyond_what_protobuf_takes(
    tmp_path: Path, reason: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of 2 GiB, which a test does not write."""
    monkeypatch.setattr(onnxruntime_session, "_PROTOBUF_BYTES_MAX", 4999)
    path = tmp_path / "a.onnx"
    path.write_bytes(random.Random(0).randbytes(5000))
    assert reason(path).startswith("a.onnx: an ONNX file ends at 2 GiB, and this one is larger")
    path.write_bytes(random.Random(0).randbytes(4999))
    assert "perhaps cut short" in reason(path)


def test_files_that_are_none(tmp_path: Path, reason: Callable[[Path], str]) -> None:
    assert reason(tmp_path / "model.onnx") == "model.onnx: no such file"
    (tmp_path / "model.onnx").mkdir()
    assert reason(tmp_path / "model.onnx") == "model.onnx: no such file"


def test_files_of_somebody_else(tmp_path: Path, reason: Callable[[Path], str]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    path.chmod(0)
    owner = os.geteuid()
    if owner == 0:  # whom modes do not stop
        os.seteuid(65534)
    try:
        assert reason(path) == "model.onnx cannot be read: Permission denied"
    finally:
        os.seteuid(owner)


def test_every_truncation_is_refused(
    tmp_path: Path, write_model: WriteModel, reason: Callable[[Path], str]
) -> None:
    whole = write_model([Node("Neg", ["x"], ["y"])], VALUE, {"y": (FLOAT, ["n"])}).read_bytes()
    path = tmp_path / "cut.onnx"
    opset_bytes = 20  # without the file's last fields it is whole, and means something else
    for length in range(1, len(whole) - opset_bytes):
        path.write_bytes(whole[:length])
        assert_presentable(reason(path), tmp_path)


def test_weights_beside_the_file(
    tmp_path: Path, build_model: BuildModel, reason: Callable[[Path], str], inspector: Inspector
) -> None:
    model = build_model(
        [Node("Add", ["x", "w"], ["y"])],
        {"x": (FLOAT, [64])},
        {"y": (FLOAT, [64])},
        {"w": np.arange(64, dtype=np.float32)},
    )
    folder = tmp_path / "1"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    engine = load(path, options=EngineOptions(), inspector=inspector).engine
    y = engine.run({"x": np.zeros(64, np.float32)}, ["y"], {})["y"]
    assert y.tolist() == list(range(64))
    engine.close()

    (folder / "weights.bin").rename(tmp_path / "weights.bin")
    text = reason(path)
    assert text.startswith("model.onnx: weights are missing: ")
    assert "weights.bin" in text
    assert_presentable(text, tmp_path)

    for location in ("../weights.bin", str(tmp_path / "weights.bin")):
        outside = onnx.load(path, load_external_data=False)
        outside.graph.initializer[0].external_data[0].value = location
        path.write_bytes(outside.SerializeToString())
        reason(path)
    os.symlink("../weights.bin", folder / "weights.bin")
    outside.graph.initializer[0].external_data[0].value = "weights.bin"
    path.write_bytes(outside.SerializeToString())
    reason(path)


def test_graphs_that_cannot_run(
    tmp_path: Path, build_model: BuildModel, reason: Callable[[Path], str]
) -> None:
    def refused(change: Callable[[Any], None]) -> str:
        model = build_model([Node("Neg", ["x"], ["y"])], VALUE, {"y": (FLOAT, ["n"])})
        change(model)
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        text = reason(path)
        assert_presentable(text, tmp_path)
        return text

    def set_opset(model: Any) -> None:
        model.opset_import[0].version = 99

    def set_operator(model: Any) -> None:
        model.graph.node[0].op_type = "Nope"

    def set_domain(model: Any) -> None:
        model.graph.node[0].domain = "own"

    def cut_wire(model: Any) -> None:
        model.graph.node[0].input[0] = "nowhere"

    def add_huge(model: Any) -> None:
        huge = model.graph.initializer.add(name="w", data_type=FLOAT)
        huge.dims.extend([1 << 40])
        model.graph.node[0].op_type = "Add"
        model.graph.node[0].input.append("w")

    assert "Opset 99" in refused(set_opset)
    assert "Nope" in refused(set_operator)
    assert "own" in refused(set_domain)
    assert "'nowhere'" in refused(cut_wire)
    assert "4398046511104 bytes" in refused(add_huge)


@pytest.mark.parametrize(
    ("make_type", "expected"),
    [
        (
            lambda: helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["n"])),
            "input 'x' is a seq(tensor(float)), expected a tensor of one of BOOL, UINT8",
        ),
        (
            lambda: helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, ["n"])),
            "input 'x' is a optional(tensor(float)), expected a tensor",
        ),
        (
            lambda: helper.make_tensor_type_proto(TensorProto.FLOAT8E4M3FN, ["n"]),
            "input 'x' is a tensor(float8e4m3fn), expected a tensor",
        ),
        (lambda: helper.make_tensor_type_proto(TensorProto.COMPLEX64, ["n"]), "complex64"),
    ],
    ids=["sequence", "optional", "float8", "complex"],
)
def test_inputs_that_no_request_can_carry(
    tmp_path: Path,
    reason: Callable[[Path], str],
    make_type: Callable[[], Any],
    expected: str,
) -> None:
    value = helper.make_value_info
    graph = helper.make_graph(
        [Node("Identity", ["x"], ["y"])],
        "graph",
        [value("x", make_type())],
        [value("y", make_type())],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    text = reason(path)
    assert expected in text
    assert_presentable(text, tmp_path)


def test_bf16_beside_text_is_refused(
    write_model: WriteModel, reason: Callable[[Path], str]
) -> None:
    path = write_model(
        [Node("Identity", ["s"], ["t"]), Node("Identity", ["x"], ["y"])],
        {"s": (TensorProto.STRING, ["n"]), "x": (TensorProto.BFLOAT16, ["n"])},
        {"t": (TensorProto.STRING, ["n"]), "y": (TensorProto.BFLOAT16, ["n"])},
    )
    assert "BYTES inputs beside BF16" in reason(path)


def assert_presentable(text: str, folder: Path) -> None:
    assert "\n" not in text
    assert ".cc:" not in text
    assert ".h:" not in text
    assert "[ONNXRuntimeError]" not in text
    assert str(folder) not in text
