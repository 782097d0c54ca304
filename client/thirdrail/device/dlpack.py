# SPDX-License-Identifier: Apache-2.0
"""Memory as a DLPack capsule, so that any array library shows it without a copy.

The structures are those of DLPack 0.8 (dlpack.h, "DLManagedTensor"), which every consumer takes. A
capsule that was taken is called "used_dltensor" and its consumer calls the deleter; one that was
not is freed with the capsule.
"""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

_NAME = b"dltensor"
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT = 4


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


# Whatever a capsule's memory belongs to, and its structures, until the consumer is done.
_held: dict[int, tuple[Any, ...]] = {}
_numbers = itertools.count(1)

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_IsValid.restype = ctypes.c_int
_api.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


def _delete(managed: Any) -> None:
    """By a consumer, on any thread."""
    _held.pop(managed.contents.context, None)


def _destroy(capsule: int) -> None:
    """The capsule goes. By its address: it has no references any more."""
    if _api.PyCapsule_IsValid(capsule, _NAME):
        managed = _Managed.from_address(_api.PyCapsule_GetPointer(capsule, _NAME))
        _held.pop(managed.context, None)


_DELETE = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))(_delete)
_DESTROY = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy)


def capsule(
    owner: object,
    address: int,
    shape: Sequence[int],
    dtype: "np.dtype[Any]",
    device: tuple[int, int],
) -> object:
    """Row-major elements at an address, which `owner` keeps alive.

    Raises BufferError for a type that DLPack has no name for.
    """
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    managed = _Managed()
    tensor = managed.tensor
    tensor.data = address
    tensor.device = _Device(*device)
    tensor.ndim = len(shape)
    tensor.dtype = _DataType(_code_of(dtype), 8 * dtype.itemsize, 1)
    tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    number = next(_numbers)
    managed.context = number
    managed.deleter = ctypes.cast(_DELETE, ctypes.c_void_p).value
    _held[number] = owner, managed, sizes
    made: object = _api.PyCapsule_New(
        ctypes.addressof(managed), _NAME, ctypes.cast(_DESTROY, ctypes.c_void_p)
    )
    return made


def _code_of(dtype: "np.dtype[Any]") -> int:
    if dtype.name == "bfloat16":
        return _BFLOAT
    if dtype.kind not in _CODES:
        raise BufferError(f"DLPack has no name for {dtype}")
    return _CODES[dtype.kind]
