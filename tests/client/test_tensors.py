# SPDX-License-Identifier: Apache-2.0
"""Tensors on the wire: every dtype there and back, and whatever lies about itself refused."""

import array as arrays
import mmap
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from thirdrail import dtypes, tensors
from thirdrail.dtypes import BY_NAME, BYTES, DTYPES, DType
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import tensor_pb2 as pb

FIXED = [row for row in DTYPES if row is not BYTES]
shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def fixed_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of any fixed-size dtype and bit pattern, also transposed, strided or big-endian."""
    dtype = draw(st.sampled_from(FIXED))
    assert dtype.numpy is not None
    shape = draw(shapes)
    if dtype.name == "BOOL":
        array = draw(npst.arrays(np.bool_, shape))
    else:
        bits = np.dtype(f"u{dtype.itemsize}")
        array = draw(npst.arrays(bits, shape)).view(dtype.numpy)
    match draw(st.sampled_from(["plain", "transposed", "reversed", "strided", "big-endian"])):
        case "transposed":
            array = array.T
        case "reversed" if array.ndim:
            array = array[::-1]
        case "strided" if array.ndim:
            array = array[..., ::2]
        case "big-endian" if dtype.name != "BF16":  # numpy swaps its own types only
            array = array.astype(array.dtype.newbyteorder(">"))
    return array


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal shapes, types and bits; NaNs count by their bits."""
    native = a.astype(a.dtype.newbyteorder("="))
    return native.shape == b.shape and native.dtype == b.dtype and native.tobytes() == b.tobytes()


@given(fixed_arrays())
def test_a_fixed_size_array_comes_back_with_every_bit(array: np.ndarray[Any, Any]) -> None:
    message = tensors.tensor_of_array("x", array)
    again = pb.Tensor.FromString(message.SerializeToString())
    assert tuple(again.shape) == array.shape
    assert len(again.raw) == array.size * array.itemsize
    assert same(array, tensors.array_of_tensor(again))


@given(fixed_arrays())
def test_the_wire_is_little_endian_and_row_major(array: np.ndarray[Any, Any]) -> None:
    wire = bytes(tensors.bytes_of_array(array))
    little = array.astype(array.dtype.newbyteorder("<"))
    assert wire == little.tobytes(order="C")


def test_an_array_in_wire_order_is_sent_from_its_own_memory() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = memoryview(tensors.bytes_of_array(array))
    array[0, 0] = 9
    assert struct.unpack("<f", view[:4])[0] == 9


def test_fixed_size_data_is_read_without_a_copy() -> None:
    data = bytearray(struct.pack("<3f", 1, 2, 3))
    array = tensors.array_of_bytes("x", BY_NAME["FP32"], [3], data)
    data[0:4] = struct.pack("<f", 7)
    assert array.tolist() == [7, 2, 3]


elements = st.one_of(st.binary(max_size=9), st.text(max_size=5))


@given(st.data())
def test_bytes_elements_come_back(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    count = int(np.prod(shape))
    items = data.draw(st.lists(elements, min_size=count, max_size=count))
    array = dtypes.object_array(items, shape)
    again = tensors.array_of_tensor(tensors.tensor_of_array("s", array))
    assert again.shape == shape
    assert again.ravel().tolist() == [dtypes.to_bytes(item) for item in items]


@given(st.lists(st.binary(min_size=3, max_size=3), max_size=20), st.booleans())
def test_elements_of_one_length_are_read_like_any_others(items: list[bytes], odd: bool) -> None:
    items = [*items, b"odd one"] if odd else items
    wire = b"".join(struct.pack("<I", len(item)) + item for item in items)
    assert dtypes.encode_bytes(items) == wire
    assert dtypes.decode_bytes(wire, len(items)) == items


@given(st.lists(st.binary(max_size=6), max_size=6), st.integers(0, 8), st.data())
def test_damaged_bytes_are_refused_or_mean_something(
    items: list[bytes], count: int, data: st.DataObject
) -> None:
    wire = bytearray(dtypes.encode_bytes(items))
    for _ in range(data.draw(st.integers(0, 3))):
        if wire:
            wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(wire[: data.draw(st.integers(0, len(wire)))])
    try:
        found = dtypes.decode_bytes(cut, count)
    except InvalidArgument:
        return
    assert len(found) == count
    assert dtypes.encode_bytes(found) == cut  # nothing was left over or invented


@pytest.mark.parametrize(
    ("wire", "count", "text"),
    [
        (b"\x05\0\0\0abc", 1, "length 5 but only 3"),
        (b"\xff\xff\xff\xffabc", 1, "length 4294967295 but only 3"),
        (b"\x01\0\0", 1, "expecting 4 bytes but only 3"),
        (b"", 1, "expect"),
        (b"\0\0\0\0", 0, "expecting 0"),
        (b"\x01\0\0\0a", 2, "expected 2 string elements, got 1"),
        (b"\x01\0\0\0a" * 3, 2, "expecting 2"),
        (b"\x01\0\0\0a\x02\0\0\0b", 2, "length 2 but only 1"),
    ],
)
def test_lying_prefixes(wire: bytes, count: int, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        dtypes.decode_bytes(wire, count)


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [2, -3],
        [1 << 62, 4],
        [1 << 32, 1 << 32],
        [1 << 63],
        [0, 1 << 62],
        [0, 1 << 47, 1 << 47],
        [1] * 17,
        [1 << 49],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["FP32", "BYTES"])
def test_shapes_that_no_memory_holds(shape: list[int], name: str) -> None:
    with pytest.raises(InvalidArgument):
        tensors.array_of_bytes("x", BY_NAME[name], shape, b"")


@given(
    st.lists(st.integers(-2, 1 << 63), max_size=20),
    st.sampled_from(DTYPES),
    st.binary(max_size=40),
)
def test_any_shape_is_an_array_or_an_invalid_argument(
    shape: list[int], dtype: DType, data: bytes
) -> None:
    try:
        array = tensors.array_of_bytes("x", dtype, shape, data)
    except InvalidArgument:
        return
    assert list(array.shape) == shape


@pytest.mark.parametrize("size", [0, 11, 13, 24])
def test_too_few_or_too_many_bytes(size: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"needs 12 bytes, got {size}"):
        tensors.array_of_bytes("x", BY_NAME["FP32"], [3], bytes(size))


def test_the_empty_tensor_needs_no_data() -> None:
    message = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FP32, shape=[0, 4])
    assert tensors.array_of_tensor(message).shape == (0, 4)


def test_a_tensor_without_data_is_refused() -> None:
    message = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FP32, shape=[1])
    with pytest.raises(InvalidArgument, match="carries no data"):
        tensors.array_of_tensor(message)


def test_a_memory_reference_is_no_inline_tensor() -> None:
    message = pb.Tensor(name="x", data_type=pb.DATA_TYPE_FP32, shape=[1], ref=pb.ArenaRef(size=4))
    with pytest.raises(InvalidArgument, match="memory reference"):
        tensors.array_of_tensor(message)


@pytest.mark.parametrize("number", [0, 15, 9999])
def test_unknown_types_are_refused(number: int) -> None:
    with pytest.raises(InvalidArgument, match=f"unknown data type {number}"):
        dtypes.dtype_of_value(number)


@pytest.mark.parametrize("bad", [np.complex64(1), np.datetime64("2020"), np.zeros(2, "i4,i4")])
def test_arrays_of_other_types_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="cannot send an array of"):
        tensors.bytes_of_array(np.asarray(bad))


@pytest.mark.parametrize("bad", [1, None, [b"nested"], 1.5])
def test_object_elements_must_be_text_or_bytes(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be bytes or str"):
        tensors.bytes_of_array(dtypes.object_array([b"fine", bad], [2]))


def test_text_of_fixed_width_is_bytes() -> None:
    for array in (np.array(["ä", "bc"]), np.array(["ä".encode(), b"bc"])):
        again = tensors.array_of_tensor(tensors.tensor_of_array("s", array))
        assert again.tolist() == ["ä".encode(), b"bc"]


def test_every_buffer_is_read() -> None:
    raw = struct.pack("<2h", 1, -2)
    mapped = mmap.mmap(-1, 4)
    mapped.write(raw)
    for buffer in (raw, bytearray(raw), memoryview(raw), mapped):
        assert tensors.array_of_bytes("x", BY_NAME["INT16"], [2], buffer).tolist() == [1, -2]
    words = memoryview(arrays.array("i", [7, 8]))  # items wider than a byte
    assert tensors.array_of_bytes("x", BY_NAME["INT32"], [2], words).tolist() == [7, 8]


# -- values ------------------------------------------------------------------------------------


@given(fixed_arrays())
def test_values_come_back(array: np.ndarray[Any, Any]) -> None:
    message = pb.Tensor(
        name="x",
        data_type=dtypes.dtype_of_array(array).value,
        shape=array.shape,
        values=tensors.values_of_array(array),
    )
    again = tensors.array_of_tensor(pb.Tensor.FromString(message.SerializeToString()))
    wanted = array.astype(array.dtype.newbyteorder("="))
    assert again.dtype == wanted.dtype
    assert again.shape == wanted.shape
    if wanted.dtype.kind in "biu":
        assert (again == wanted).all()
    else:  # a NaN keeps being one, its payload does not survive the conversion to double
        np.testing.assert_array_equal(again.astype(np.float64), wanted.astype(np.float64))


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=4))
def test_bytes_values_are_text_where_they_can_be(items: list[bytes]) -> None:
    values = tensors.values_of_array(dtypes.object_array(items, [len(items)]))
    message = pb.Tensor(name="s", data_type=BYTES.value, shape=[len(items)], values=values)
    assert tensors.array_of_tensor(message).tolist() == items
    assert bool(values.strings) != bool(values.byte_strings)


@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
def test_values_in_a_field_of_another_type_are_refused(row: DType) -> None:
    fields: dict[str, list[Any]] = {
        "bools": [True],
        "ints": [1],
        "uints": [1],
        "floats": [1.0],
        "strings": ["a"],
        "byte_strings": [b"a"],
    }
    allowed = tensors._VALUES_FIELD[row.name]
    for field, elements in fields.items():
        values = pb.Values(**{field: elements})
        if field in allowed:
            assert tensors.array_of_values("x", row, [1], values).shape == (1,)
        else:
            with pytest.raises(InvalidArgument, match=f"takes its values from .*got '{field}'"):
                tensors.array_of_values("x", row, [1], values)
    assert len(allowed) == (2 if row is BYTES else 1)


def test_two_filled_fields_are_refused() -> None:
    values = pb.Values(ints=[1], floats=[1.0])
    with pytest.raises(InvalidArgument, match="'ints, floats'"):
        tensors.array_of_values("x", BY_NAME["INT8"], [1], values)


@pytest.mark.parametrize(
    ("name", "number"),
    [("INT8", 128), ("INT8", -129), ("INT16", 1 << 15), ("INT32", -(1 << 31) - 1)],
)
def test_numbers_that_do_not_fit_are_refused(name: str, number: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{number} does not fit {name}"):
        tensors.array_of_values("x", BY_NAME[name], [2], pb.Values(ints=[0, number]))


@pytest.mark.parametrize(("name", "number"), [("UINT8", 256), ("UINT32", 1 << 32)])
def test_unsigned_numbers_that_do_not_fit_are_refused(name: str, number: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{number} does not fit {name}"):
        tensors.array_of_values("x", BY_NAME[name], [1], pb.Values(uints=[number]))


def test_the_largest_numbers_fit() -> None:
    largest = pb.Values(uints=[(1 << 64) - 1])
    assert tensors.array_of_values("x", BY_NAME["UINT64"], [1], largest)[0] == (1 << 64) - 1
    smallest = pb.Values(ints=[-(1 << 63)])
    assert tensors.array_of_values("x", BY_NAME["INT64"], [1], smallest)[0] == -(1 << 63)


@pytest.mark.parametrize("name", ["FP16", "BF16", "FP32", "FP64"])
def test_floats_too_large_are_infinite(name: str) -> None:
    values = pb.Values(floats=[1e308 * 10, -1e300, float("nan")])
    found = tensors.array_of_values("x", BY_NAME[name], [3], values).astype(np.float64)
    assert found[0] == np.inf
    assert np.isnan(found[2])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_values_must_fit_the_shape(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"needs 3 values, got {count}"):
        tensors.array_of_values("x", BY_NAME["FP32"], [3], pb.Values(floats=[1.0] * count))


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    array = np.array([1.0, -2.5], dtype=ml_dtypes.bfloat16)
    wire = bytes(tensors.bytes_of_array(array))
    wide = np.array([1.0, -2.5], dtype="<f4").tobytes()
    assert wire == wide[2:4] + wide[6:8]


def test_text_that_utf_8_has_not_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgument, match="a BYTES element cannot be sent"):
        dtypes.encode_bytes(["\ud800"])
