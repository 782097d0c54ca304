# SPDX-License-Identifier: Apache-2.0
"""The one table of element types, and the codec of the only variable-length one, BYTES.

Layouts are KServe v2's ("binary tensor data extension"): little-endian, row-major; BOOL is one
byte; BF16 is the upper half of an FP32; a BYTES element is a 4-byte little-endian length and then
its bytes.
"""

import functools
import math
import mmap
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thirdrail.errors import InvalidArgument
from thirdrail.v1 import tensor_pb2 as pb

assert sys.byteorder == "little", "tensors are little-endian on the wire and are not swapped"

LENGTH_BYTES = 4

Buffer = bytes | bytearray | memoryview | mmap.mmap


# BF16 is missing: its type is imported when it is asked for.
_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}


@dataclass(frozen=True)  # without slots: `numpy` is kept in __dict__
class DType:
    """An element type: its number in our messages, its KServe name, its size, its numpy type."""

    value: pb.DataType.ValueType
    name: str
    itemsize: int  # 0: BYTES, each element has its own size

    @functools.cached_property
    def numpy(self) -> np.dtype[Any] | None:
        """None: BF16 without ml_dtypes; it then travels as raw bytes only.

        That package takes 3 MB of a process, and few models need it.
        """
        found: Any = _NUMPY.get(self.name)
        if found is None:
            try:
                from ml_dtypes import bfloat16 as found
            except ImportError:
                return None
        dtype: np.dtype[Any] = np.dtype(found)
        return dtype


def _row(name: str, itemsize: int) -> DType:
    return DType(pb.DataType.Value(f"DATA_TYPE_{name}"), name, itemsize)


DTYPES: tuple[DType, ...] = (
    _row("BOOL", 1),
    _row("UINT8", 1),
    _row("UINT16", 2),
    _row("UINT32", 4),
    _row("UINT64", 8),
    _row("INT8", 1),
    _row("INT16", 2),
    _row("INT32", 4),
    _row("INT64", 8),
    _row("FP16", 2),
    _row("BF16", 2),
    _row("FP32", 4),
    _row("FP64", 8),
    _row("BYTES", 0),
)

BY_VALUE: dict[int, DType] = {row.value: row for row in DTYPES}
BY_NAME: dict[str, DType] = {row.name: row for row in DTYPES}
_BY_NUMPY: dict[np.dtype[Any], DType] = {
    np.dtype(numpy): BY_NAME[name] for name, numpy in _NUMPY.items()
}

BYTES = BY_NAME["BYTES"]
BOOL = BY_NAME["BOOL"]
BF16 = BY_NAME["BF16"]
_BF16_NAME = "bfloat16"  # numpy's name for the type of ml_dtypes, known once that is imported


def extent(
    shape: Sequence[int] | int, dtype: npt.DTypeLike
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, numpy type and bytes of an array that is asked for.

    dtype: numpy's, or one of our names, like "FP32".
    Raises InvalidArgument for a shape or a type that no array has.
    """
    dims = (shape,) if isinstance(shape, int | np.integer) else shape
    wanted = _numpy_type(dtype)
    if not isinstance(dims, Iterable):
        raise InvalidArgument(f"a shape is an int or a sequence of them, got {shape!r}")
    dims = tuple(dims)
    if not all(isinstance(dim, int | np.integer) and dim >= 0 for dim in dims):
        raise InvalidArgument(f"a shape has numbers from 0, got {list(dims)}")
    plain = tuple(map(int, dims))
    return plain, wanted, math.prod(plain) * wanted.itemsize


def _numpy_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    row = None
    if isinstance(dtype, str):
        row = BF16 if dtype == _BF16_NAME else BY_NAME.get(dtype)
    if row is not None:
        if row.numpy is None:
            raise InvalidArgument("arrays of BF16 need ml_dtypes: pip install ml_dtypes")
        return row.numpy
    try:
        return np.dtype(dtype)
    except TypeError:
        raise InvalidArgument(
            f"{dtype!r} is no element type, expected numpy's or one of {', '.join(BY_NAME)}"
        ) from None


def dtype_of_value(value: int) -> DType:
    """The row of a `thirdrail.v1.DataType`. Raises InvalidArgument for an unknown number."""
    row = BY_VALUE.get(value)
    if row is None:
        raise InvalidArgument(f"unknown data type {value}, expected one of {', '.join(BY_NAME)}")
    return row


def dtype_of_array(array: npt.NDArray[Any]) -> DType:
    """The row of an array's dtype; text is BYTES. Raises InvalidArgument for other types."""
    row = _BY_NUMPY.get(array.dtype)
    if row is not None:
        return row
    if array.dtype.kind in "SUT":  # T: numpy's StringDType
        return BYTES
    if array.dtype.name == _BF16_NAME:
        return BF16
    row = _BY_NUMPY.get(array.dtype.newbyteorder("="))
    if row is not None:
        return row
    raise InvalidArgument(
        f"cannot send an array of {array.dtype}, expected one of {', '.join(BY_NAME)}"
    )


def encode_bytes(elements: Iterable[bytes | str]) -> bytes:
    """BYTES elements in row-major order -> their wire form. Strings are sent as UTF-8."""
    items = [to_bytes(element) for element in elements]
    lengths = np.fromiter(map(len, items), dtype=np.uint64, count=len(items))
    if items and int(lengths.max()) >= 1 << 32:
        raise InvalidArgument("a BYTES element must be shorter than 4 GiB")
    prefixes = lengths.astype("<u4").tobytes()
    parts: list[bytes] = [b""] * (2 * len(items))
    parts[0::2] = [prefixes[i : i + LENGTH_BYTES] for i in range(0, len(prefixes), LENGTH_BYTES)]
    parts[1::2] = items
    return b"".join(parts)


def to_bytes(element: Any) -> bytes:
    """One BYTES element. Raises InvalidArgument for anything that is neither text nor bytes, and
    for text that UTF-8 has not."""
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        try:
            return element.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"a BYTES element cannot be sent: {error}") from None
    if isinstance(element, (bytearray, memoryview, np.bytes_)):
        return bytes(element)
    raise InvalidArgument(f"a BYTES element must be bytes or str, got {type(element).__name__}")


def decode_bytes(data: Buffer, count: int, whose: str = "") -> list[bytes]:
    """The wire form of `count` BYTES elements -> the elements.

    whose: what the error says it is about, e.g. " for inference input 'x' for model 'm'".
    Raises InvalidArgument when the lengths do not add up to exactly `count` elements and all of
    `data`.
    """
    view = memoryview(data).cast("B")
    uniform = _decode_uniform(view, count)
    if uniform is not None:
        return uniform
    elements: list[bytes] = []
    position, end = 0, len(view)
    while position < end:
        if len(elements) == count:
            raise InvalidArgument(
                f"unexpected number of string elements {count + 1}{whose}, expecting {count}"
            )
        start = position + LENGTH_BYTES
        if start > end:
            raise InvalidArgument(
                f"incomplete string length indicator{whose}, expecting 4 bytes but only "
                f"{end - position} bytes available"
            )
        position = start + int.from_bytes(view[position:start], "little")
        if position > end:
            raise InvalidArgument(
                f"incomplete string data{whose}, expecting string of length {position - start} "
                f"but only {end - start} bytes available"
            )
        elements.append(bytes(view[start:position]))
    if len(elements) != count:
        raise InvalidArgument(f"expected {count} string elements{whose}, got {len(elements)}")
    return elements


def _decode_uniform(view: memoryview, count: int) -> list[bytes] | None:
    """The elements when all have one length (ids, hashes): no walk from prefix to prefix."""
    if count < 2 or len(view) % count or len(view) < LENGTH_BYTES * count:
        return None
    stride = len(view) // count
    table = np.frombuffer(view, dtype=np.uint8).reshape(count, stride)
    prefixes = np.ascontiguousarray(table[:, :LENGTH_BYTES]).view("<u4")
    if not bool((prefixes == stride - LENGTH_BYTES).all()):
        return None
    whole = bytes(view)
    return [whole[i + LENGTH_BYTES : i + stride] for i in range(0, len(whole), stride)]


def object_array(elements: Sequence[Any], shape: Sequence[int]) -> npt.NDArray[np.object_]:
    """An object array of BYTES elements; never lets numpy look inside them."""
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    return array.reshape(shape)
