# SPDX-License-Identifier: Apache-2.0
"""What is found out about a file in PyTorch's formats before PyTorch sees it."""

import json
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.torch_sources import Kind, kind_of

WEIGHT = {"path_name": "weight_0", "use_pickle": False}
TENSOR = {"path_name": "tensor_0", "use_pickle": False}


def program_members(
    weights: Any = {"w": WEIGHT},  # noqa: B006  # never changed
    constants: Any = {"c": TENSOR},  # noqa: B006
) -> dict[str, bytes]:
    """What torch.export.save writes, as far as it is looked at."""
    return {
        "m/archive_format": b"pt2",
        "m/models/model.json": b"{}",
        "m/data/weights/weight_0": b"\0" * 64,
        "m/data/weights/model_weights_config.json": json.dumps({"config": weights}).encode(),
        "m/data/constants/tensor_0": b"\0" * 8,
        "m/data/constants/model_constants_config.json": json.dumps({"config": constants}).encode(),
    }


def write_archive(path: Path, members: Mapping[str, bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def reason(path: Path) -> str:
    with pytest.raises(BuildError) as caught:
        kind_of(path)
    assert caught.value.fault is BuildFault.REFUSED
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


def test_the_two_kinds_that_are_read(tmp_path: Path) -> None:
    program = write_archive(tmp_path / "m.pt2", program_members())
    assert kind_of(program) is Kind.EXPORTED
    script = write_archive(
        tmp_path / "m.pt", {"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/a.py": b""}
    )
    assert kind_of(script) is Kind.TORCHSCRIPT


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (random.Random(0).randbytes(5000), "not a file of PyTorch's: no zip archive"),
        (pickle.dumps({"w": 1}), "a Python pickle, as torch.save wrote it before PyTorch 1.6"),
        (b"\x10\0\0\0\0\0\0\0{}", "looks like safetensors, which holds weights and no model"),
    ],
    ids=["empty", "random", "pickle", "safetensors"],
)
def test_what_is_no_archive(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    assert reason(path).startswith(f"m.pt2: {expected}")


def test_an_onnx_file_in_disguise_is_called_by_its_name(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["x2"])], "g", [value], [])
    for producer in ("", "me"):
        onnx.save(helper.make_model(graph, producer_name=producer), tmp_path / "m.pt2")
        assert reason(tmp_path / "m.pt2") == "m.pt2: looks like an ONNX file: name it model.onnx"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.txt": b""}, "a zip archive, but none of PyTorch's"),
        (
            {"m/data.pkl": b"", "m/data/0": b""},
            "written by torch.save: a pickled module or a state",
        ),
        ({"serialized_exported_program.json": b""}, "written by torch.export.save of PyTorch 2.7"),
        ({**program_members(), "m/archive_format": b"pt9"}, "an archive of the format b'pt9'"),
        (
            {**program_members(), "m/data/aotinductor/model/a.so": b""},
            "holds libraries compiled by AOTInductor",
        ),
        (
            {**program_members(), "m/models/other.json": b"{}"},
            "expected one program, models/model.json, found models/model.json, models/other.json",
        ),
        ({**program_members(), "m/data/weights/model.pt": b""}, "its weights are pickled"),
        ({**program_members(), "m/data/constants/model.pt": b""}, "its constants are pickled"),
        (program_members(weights={"w": {**WEIGHT, "use_pickle": True}}), "'w' in data/weights/"),
        (program_members(weights={"w": {"path_name": "weight_0"}}), "'w' in data/weights/"),
        (program_members(weights={"w": None}), "'w' in data/weights/"),
        (program_members(constants={"c": {**TENSOR, "use_pickle": True}}), "'c' in data/constants"),
        (
            program_members(constants={"c": {**TENSOR, "path_name": "custom_obj_0"}}),
            "'c' in data/constants/model_constants_config.json is a pickled object",
        ),
        (
            program_members(constants={"c": {**TENSOR, "path_name": "opaque_obj_0"}}),
            "'c' in data/constants/model_constants_config.json is a pickled object",
        ),
        (
            program_members(weights={"w": {**WEIGHT, "path_name": "weight_1"}}),
            "damaged: weight_1, which holds 'w', is missing",
        ),
        (program_members(weights=[1]), "damaged: m/data/weights/model_weights_config.json is not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_are_refused(
    tmp_path: Path, members: Mapping[str, bytes], expected: str
) -> None:
    text = reason(write_archive(tmp_path / "m.pt2", members))
    assert text.startswith(f"m.pt2: {expected}")


def test_a_table_that_is_missing(tmp_path: Path) -> None:
    members = program_members()
    del members["m/data/weights/model_weights_config.json"]
    assert "damaged: data/weights/model_weights_config.json is missing" in reason(
        write_archive(tmp_path / "m.pt2", members)
    )


def test_every_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt2", program_members())
    whole = path.read_bytes()
    start = whole.index(b"\0" * 64)
    for place in range(start, start + 64):
        path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
        assert reason(path).startswith("m.pt2: damaged: m/data/weights/weight_0 does not have the")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt2", program_members())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        text = reason(path)
        assert "cut short" in text or "empty" in text or "no zip archive" in text


def test_the_archive_inside_is_not_taken_for_a_file_that_is_cut_short(tmp_path: Path) -> None:
    inner = write_archive(tmp_path / "inputs.pt", {"inputs/data.pkl": b"", "inputs/version": b"3"})
    members = {**program_members(), "m/data/sample_inputs/model.pt": inner.read_bytes()}
    path = write_archive(tmp_path / "m.pt2", members)
    assert kind_of(path) is Kind.EXPORTED
    whole = path.read_bytes()
    for length in range(whole.index(inner.read_bytes()) + inner.stat().st_size, len(whole)):
        path.write_bytes(whole[:length])
        assert reason(path) == "m.pt2: cut short or damaged: its table of contents is missing"


def test_an_archive_that_unpacks_to_much_is_refused_unread(tmp_path: Path) -> None:
    members = {**program_members(), "m/code": b"\0" * (65 << 20)}
    path = write_archive(tmp_path / "m.pt2", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "bytes of it are compressed, at most 67108864 are unpacked" in reason(path)


def test_a_file_that_is_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"m\.pt2: no such file") as caught:
        kind_of(tmp_path / "m.pt2")
    assert caught.value.fault is BuildFault.MISSING
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(BuildError, match=r"m\.pt2 cannot be read: Is a directory"):
        kind_of(tmp_path / "m.pt2")


def test_torch_is_imported_by_nobody_who_does_not_read_its_files() -> None:
    code = (
        "import sys, thirdrail_engines, thirdrail_engines.torch_sources, "
        "thirdrail_engines.precision; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
