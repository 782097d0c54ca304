# SPDX-License-Identifier: Apache-2.0
"""Typed elements (InferTensorContents) become the raw bytes that everything behind works with."""

from collections.abc import Sequence

import numpy as np

from thirdrail import dtypes
from thirdrail.errors import InvalidArgument
from thirdrail_server.inference import grpc_service_pb2 as kserve

# FP16 and BF16 have no list: they travel as raw bytes only.
_DATATYPES: dict[str, tuple[str, ...]] = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT8", "INT16", "INT32"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT8", "UINT16", "UINT32"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}


def bytes_of_contents(tensor: kserve.ModelInferRequest.InferInputTensor, model: str) -> bytes:
    """The raw form of `tensor.contents`. The number of elements is not compared with the shape.

    Raises InvalidArgument when a list other than the datatype's is filled, or an integer does not
    fit the datatype.
    """
    raw = b""
    for field, elements in tensor.contents.ListFields():
        if tensor.datatype not in _DATATYPES[field.name]:
            expected = " or ".join(f"'{name}'" for name in _DATATYPES[field.name])
            raise InvalidArgument(
                f"unexpected explicit tensor data for input tensor '{tensor.name}' for model "
                f"'{model}' of type '{tensor.datatype}', expected datatype {expected}"
            )
        raw = _raw_of_elements(tensor, elements, model)
    return raw


def _raw_of_elements(
    tensor: kserve.ModelInferRequest.InferInputTensor, elements: Sequence[bytes | float], model: str
) -> bytes:
    dtype = dtypes.BY_NAME[tensor.datatype]
    if dtype is dtypes.BYTES:
        return dtypes.encode_bytes(elements)  # type: ignore[arg-type]  # this list holds bytes
    assert dtype.numpy is not None
    if dtype.numpy.kind not in "iu":
        return np.fromiter(elements, dtype.numpy, count=len(elements)).tobytes()
    # The list may be wider than the tensor's type: each element is checked, then narrowed.
    limits = np.iinfo(dtype.numpy)
    wide = np.fromiter(elements, f"{dtype.numpy.kind}8", count=len(elements))
    wrong = wide[(wide < limits.min) | (wide > limits.max)]
    if wrong.size:
        raise InvalidArgument(
            f"input tensor '{tensor.name}' for model '{model}': {wrong[0]} does not fit "
            f"{tensor.datatype}"
        )
    return wide.astype(dtype.numpy).tobytes()
