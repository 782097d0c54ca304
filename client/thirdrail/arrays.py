# SPDX-License-Identifier: Apache-2.0
"""What callers hand over as tensors -> numpy arrays.

Arrays of any library are sent exactly as they are: a wrong dtype is the caller's mistake, and the
server says so. Plain Python values have no dtype of their own and take the one that the model
declares.
"""

import sys
from typing import Any, TypeGuard

import numpy as np

from thirdrail import dtypes
from thirdrail.dtypes import BF16, BYTES, DType
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array, TensorSpec

# What numpy and other libraries raise for what they cannot show as an array.
UNREADABLE = (TypeError, ValueError, OverflowError, RuntimeError, BufferError)
_ARRAY_METHODS = ("__array__", "__array_interface__", "__dlpack__")


def has_dtype(value: object) -> bool:
    """Whether the value says what its elements are: an array, or a buffer other than bytes."""
    if type(value) is np.ndarray:  # nearly always; the rest takes ten times as long
        return True
    if isinstance(value, (str, bytes, int, float)):
        return False
    return any(hasattr(value, method) for method in _ARRAY_METHODS) or _is_buffer(value)


def array_of_value(name: str, value: Any, spec: TensorSpec | None) -> Array:
    """The array that is sent for `value`, without a copy where that is possible.

    spec: what the model declares; needed for values that are not `has_dtype`.
    Raises InvalidArgument for what cannot be an array of that type, GPU memory included.
    """
    if type(value) is np.ndarray:
        return value
    try:
        if has_dtype(value):
            return array_of_array(value)
        assert spec is not None, "plain values are converted by the model's declaration"
        return _array_of_plain(value, spec)
    except (*UNREADABLE, InvalidArgument) as error:
        raise InvalidArgument(
            f"cannot send {type(value).__name__} as input '{name}': {error}"
        ) from error


def array_of_array(value: Any) -> Array:
    """Of what `has_dtype`. Raises one of UNREADABLE."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16:
        bits: Array = value.view(torch.int16).numpy()  # numpy has no such type
        return bits.view(_numpy_of(BF16))
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    ma = sys.modules.get("numpy.ma")  # where nobody has imported it, nothing is masked
    if ma is not None and isinstance(value, ma.MaskedArray) and ma.is_masked(value):
        raise TypeError("its mask cannot be sent; .filled(value) makes an array without one")
    return np.asarray(value)


def _array_of_plain(value: Any, spec: TensorSpec) -> Array:
    """Lists keep their shape; a single value becomes one element of the declared rank."""
    if isinstance(value, bytes) and spec.dtype is not BYTES:
        raise TypeError(f"expected {spec.dtype.name}; np.frombuffer makes an array of raw bytes")
    if spec.dtype is BYTES:
        array = _array_of_strings(value)
    else:
        array = _array_of_numbers(value, spec.dtype)
    return array.reshape((1,) * len(spec.shape)) if array.ndim == 0 else array


# Which kinds of Python number a declared kind takes: nothing is rounded to a whole number or
# parsed.
_TAKES = {"b": "b", "i": "biu", "u": "biu", "f": "biuf"}


def _array_of_numbers(value: Any, dtype: DType) -> Array:
    wanted = _numpy_of(dtype)
    natural = np.asarray(value)
    kind = natural.dtype.kind
    if kind == "O" or (kind == "f" and wanted.kind in "iu"):
        exact = np.asarray(value, np.object_)
        if all(isinstance(element, int | np.integer) for element in exact.flat):
            natural, kind = exact, "i"  # beyond INT64, which numpy takes for FP64 or for objects
    if natural.size and kind not in _TAKES.get(wanted.kind, "biuf") and natural.dtype != wanted:
        raise TypeError(f"its elements are {natural.dtype}, expected {dtype.name}")
    if wanted.kind in "iu" and natural.size:
        limits = np.iinfo(wanted)
        for extreme in (int(natural.min()), int(natural.max())):
            if not limits.min <= extreme <= limits.max:
                raise OverflowError(f"{extreme} does not fit {dtype.name}")
    with np.errstate(over="ignore"):  # too large for FP16 is infinity, as everywhere
        return natural.astype(wanted)


def _numpy_of(dtype: DType) -> np.dtype[Any]:
    if dtype.numpy is None:
        raise TypeError("BF16 needs the package ml_dtypes")
    return dtype.numpy


def _array_of_strings(value: Any) -> Array:
    if isinstance(value, (str, bytes)):
        return dtypes.object_array([value], ())
    array = np.array(value, dtype=np.object_)
    for element in array.flat:
        dtypes.to_bytes(element)  # named here, where the input's name is known
    return array


def _is_buffer(value: object) -> TypeGuard[memoryview]:
    try:
        memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
