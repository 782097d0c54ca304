# SPDX-License-Identifier: Apache-2.0
"""Arrays <-> tensor messages, and the size arithmetic that every receiver of a tensor relies on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thirdrail import dtypes
from thirdrail.dtypes import BYTES, Buffer, DType
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import tensor_pb2 as pb

Array = npt.NDArray[Any]

RANK_MAX = 16
ELEMENTS_MAX = (
    1 << 48
)  # no shape may name more, whatever its element size; keeps all sums far below 2**63


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as a model declares it. -1 in the shape: any size."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    optional: bool = False

    def to_message(self) -> pb.TensorSpec:
        return pb.TensorSpec(
            name=self.name, data_type=self.dtype.value, shape=self.shape, optional=self.optional
        )


def element_count(name: str, shape: Sequence[int]) -> int:
    """How many elements a shape from the wire names.

    Raises InvalidArgument for a negative dimension, a rank above RANK_MAX or a product above
    ELEMENTS_MAX.
    """
    # The usual case first, since every tensor of every call comes by here.
    if shape and len(shape) <= RANK_MAX and min(shape) > 0:
        count = math.prod(shape)
        if count <= ELEMENTS_MAX:
            return count
    if len(shape) > RANK_MAX:
        raise InvalidArgument(f"tensor '{name}' has {len(shape)} dimensions, expected at most 16")
    if any(dim < 0 for dim in shape):
        raise InvalidArgument(
            f"tensor '{name}' has a negative dimension in its shape {list(shape)}"
        )
    # A zero must not excuse the others: numpy counts the bytes of [0, 2**47, 2**47] without it.
    if math.prod(dim for dim in shape if dim) > ELEMENTS_MAX:
        raise InvalidArgument(
            f"tensor '{name}' has the shape {list(shape)}, more than {ELEMENTS_MAX} elements"
        )
    return math.prod(shape)


def array_of_bytes(name: str, dtype: DType, shape: Sequence[int], data: Buffer) -> Array:
    """The tensor whose little-endian elements `data` holds: a view, or for BYTES an object array of
    bytes.

    Raises InvalidArgument when the size of `data` is not exactly what dtype and shape say.
    """
    count = element_count(name, shape)
    if dtype is BYTES:
        elements = dtypes.decode_bytes(data, count, f" for tensor '{name}'")
        return dtypes.object_array(elements, shape)
    size = memoryview(data).nbytes
    if size != count * dtype.itemsize:
        raise InvalidArgument(
            f"tensor '{name}' of type {dtype.name} and shape {list(shape)} needs "
            f"{count * dtype.itemsize} bytes, got {size}"
        )
    if dtype.numpy is None:
        raise InvalidArgument(f"tensor '{name}' is BF16: install ml_dtypes to read it as an array")
    return np.frombuffer(data, dtype=dtype.numpy).reshape(shape)


def bytes_of_array(array: Array) -> Buffer:
    """The wire form of an array: its own memory if that is in wire order already, else a copy."""
    dtype = dtypes.dtype_of_array(array)
    if dtype is BYTES:
        return dtypes.encode_bytes(array.ravel().tolist())
    # ascontiguousarray would turn a scalar into one dimension; order="C" keeps the shape.
    contiguous = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
    return contiguous.reshape(-1).view(np.uint8).data


def tensor_of_array(name: str, array: Array) -> pb.Tensor:
    """A message that carries the array inline."""
    dtype = dtypes.dtype_of_array(array)
    return pb.Tensor(
        name=name, data_type=dtype.value, shape=array.shape, raw=bytes(bytes_of_array(array))
    )


def array_of_tensor(tensor: pb.Tensor) -> Array:
    """The array of a message that carries its elements inline, raw or as values.

    Raises InvalidArgument for an unknown type, a shape that does not fit the data, or a tensor
    without any.
    """
    dtype = dtypes.dtype_of_value(tensor.data_type)
    form = tensor.WhichOneof("data")
    if form == "values":
        return array_of_values(tensor.name, dtype, tensor.shape, tensor.values)
    if form == "raw" or (form is None and 0 in tensor.shape):
        return array_of_bytes(tensor.name, dtype, tensor.shape, tensor.raw)
    raise InvalidArgument(
        f"tensor '{tensor.name}' carries {'a memory reference' if form else 'no data'}, "
        "expected raw bytes or values"
    )


_VALUES_FIELD: dict[str, tuple[str, ...]] = {
    "BOOL": ("bools",),
    "BYTES": ("strings", "byte_strings"),
    **{row.name: ("ints",) for row in dtypes.DTYPES if row.name.startswith("INT")},
    **{row.name: ("uints",) for row in dtypes.DTYPES if row.name.startswith("UINT")},
    **dict.fromkeys(("FP16", "BF16", "FP32", "FP64"), ("floats",)),
}


def array_of_values(name: str, dtype: DType, shape: Sequence[int], values: pb.Values) -> Array:
    """The array of a tensor whose elements were written out.

    Raises InvalidArgument when a field other than the type's is filled, the count does not fit the
    shape, or a number does not fit the type.
    """
    count = element_count(name, shape)
    allowed = _VALUES_FIELD[dtype.name]
    filled = [field.name for field, _ in values.ListFields()]
    if len(filled) > 1 or any(field not in allowed for field in filled):
        raise InvalidArgument(
            f"tensor '{name}' of type {dtype.name} takes its values from '{' or '.join(allowed)}', "
            f"got '{', '.join(filled)}'"
        )
    elements = getattr(values, filled[0]) if filled else []
    if len(elements) != count:
        raise InvalidArgument(
            f"tensor '{name}' of shape {list(shape)} needs {count} values, got {len(elements)}"
        )
    if dtype is BYTES:
        return dtypes.object_array(
            [e.encode() if isinstance(e, str) else e for e in elements], shape
        )
    if dtype.numpy is None:
        raise InvalidArgument(f"tensor '{name}' is BF16: install ml_dtypes to read values")
    return _checked_numbers(name, dtype, elements).reshape(shape)


def _checked_numbers(name: str, dtype: DType, elements: Sequence[Any]) -> Array:
    assert dtype.numpy is not None
    if dtype.numpy.kind in "iu":
        limits = np.iinfo(dtype.numpy)
        wrong = next((e for e in elements if not limits.min <= e <= limits.max), None)
        if wrong is not None:
            raise InvalidArgument(f"tensor '{name}': {wrong} does not fit {dtype.name}")
    with np.errstate(over="ignore"):  # a float too large for FP16 becomes infinity, as a cast does
        return np.array(elements, dtype=dtype.numpy)


def values_of_array(array: Array) -> pb.Values:
    """The elements of an array written out, row-major. BYTES that are all UTF-8 become strings."""
    dtype = dtypes.dtype_of_array(array)
    if dtype is not BYTES:
        field = _VALUES_FIELD[dtype.name][0]
        wide = array.astype(np.float64) if field == "floats" else array
        return pb.Values(**{field: wide.ravel().tolist()})
    elements = [dtypes.to_bytes(e) for e in array.ravel().tolist()]
    try:
        return pb.Values(strings=[e.decode() for e in elements])
    except UnicodeDecodeError:
        return pb.Values(byte_strings=elements)
