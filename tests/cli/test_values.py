# SPDX-License-Identifier: Apache-2.0
"""Typed values and printed results, where no server is needed."""

from pathlib import Path

import numpy as np
import pytest

from thirdrail.cli import values
from thirdrail.dtypes import BY_NAME, object_array
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import TensorSpec


def spec(*shape: int, name: str = "FP32") -> TensorSpec:
    return TensorSpec("x", BY_NAME[name], shape)


@pytest.mark.parametrize(
    ("shape", "count", "wanted"),
    [
        ((-1,), 3, (3,)),
        ((-1, 4), 4, (1, 4)),
        ((-1, 4), 8, (2, 4)),
        ((-1, -1), 6, (1, 6)),
        ((-1, 2, -1), 6, (1, 2, 3)),
        ((2, 3), 6, (2, 3)),
        ((), 1, ()),
        ((1, 3, -1), 0, (1, 3, 0)),
    ],
)
def test_flat_values_fill_the_open_sizes(
    shape: tuple[int, ...], count: int, wanted: tuple[int, ...]
) -> None:
    assert values.fitting_shape(spec(*shape), count) == wanted


@pytest.mark.parametrize(("shape", "count"), [((-1, 4), 6), ((2, 3), 5), ((), 2), ((0, -1), 1)])
def test_values_that_fit_no_shape(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{count} elements do not fit"):
        values.fitting_shape(spec(*shape), count)


def test_a_file_of_any_bytes_is_one_element(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\0")
    array = values.array_of_text(f"@{tmp_path}/cat.jpg", spec(-1, 1, name="BYTES"))
    assert array.tolist() == [[b"\xff\xd8\0"]]


def test_a_file_of_half_an_element(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(6))
    with pytest.raises(InvalidArgument, match="6 bytes, no whole number of FP32"):
        values.array_of_text(f"@{tmp_path}/raw", spec(-1))


def test_numpy_files_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", object_array([{}], [1]), allow_pickle=True)
    with pytest.raises(InvalidArgument, match=r"no file of numpy\.save with numbers"):
        values.array_of_text(f"@{tmp_path}/x.npy", spec(-1))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npy", b"", "is damaged, or no file"),
        ("x.npy", b"no array\n", "is damaged, or no file"),
        ("x.npy", b"PK\x03\x04, as a .npz file begins", "is damaged, or no file"),
        ("x.npz", b"PK\x03\x04", "several arrays"),
        ("x.json", b"\xff\xfe", "is not JSON"),
    ],
)
def test_files_that_are_not_what_their_names_say(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=says):
        values.array_of_text(f"@{tmp_path / name}", spec(-1))


def test_a_numpy_file_that_was_cut_short(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(9, np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "x.npy").write_bytes(whole[:size])
        with pytest.raises(InvalidArgument, match="damaged"):
            values.array_of_text(f"@{tmp_path}/x.npy", spec(-1))


def test_bytes_that_are_no_text() -> None:
    array = object_array([b"\xff\0", "häl".encode()], [2])
    assert values.json_of_array(array)["data"] == [{"base64": "/wA="}, "häl"]
    assert values.text_of_array(array) == "2 bytes, ff 00\nhäl"


def test_json_has_no_number_for_everything() -> None:
    array = np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float16)
    assert values.json_of_array(array) == {
        "datatype": "FP16",
        "shape": [2, 2],
        "data": [["NaN", "Infinity"], ["-Infinity", 0.5]],
    }


def test_large_outputs_are_cut() -> None:
    assert len(values.text_of_array(np.zeros((1000, 1000)))) < 2000
    assert values.text_of_array(object_array([b"a"] * 1000, [1000])).endswith("…")


def test_files_that_cannot_hold_the_outputs(tmp_path: Path) -> None:
    number, text = np.zeros(2), object_array([b"a", b"b"], [2])
    for name, outputs, wanted in (
        ("y.npy", {"a": number, "b": number}, "choose one with --output"),
        ("y.npy", {"a": text}, "BYTES"),
        ("y.npz", {"a": number, "b": text}, "BYTES"),
        ("y.bin", {"a": number}, "expected a .npy or .npz"),
        ("y.bin", {"a": text}, "expected a .npy or .npz"),
    ):
        with pytest.raises(InvalidArgument, match=wanted):
            values.save(tmp_path / name, outputs)
