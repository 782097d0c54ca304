# SPDX-License-Identifier: Apache-2.0
"""What a made-up model takes and gives, and tensors to send to it: for tests without an engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.version_spec import VersionSpec

X = TensorSpec("x", BY_NAME["FP32"], (-1, 3))
INDEX = TensorSpec("index", BY_NAME["INT64"], (-1,))
WORDS = TensorSpec("s", BY_NAME["BYTES"], (-1,))
SCALE = TensorSpec("scale", BY_NAME["FP32"], (1,), optional=True)
RESULTS = (
    TensorSpec("y", BY_NAME["FP32"], (-1, 3)),
    TensorSpec("z", BY_NAME["FP32"], (-1, 3)),
    TensorSpec("words", BY_NAME["BYTES"], (-1,)),
)


def spec_of(*inputs: TensorSpec, rows_max: int = 0) -> VersionSpec:
    """Model "m" with these inputs, of which "x" is positional, and RESULTS."""
    return VersionSpec(
        model="m",
        version=1,
        inputs={tensor.name: tensor for tensor in inputs},
        outputs={tensor.name: tensor for tensor in RESULTS},
        batch_rows_max=rows_max,
        positional_inputs=frozenset({"x"}),
        labels={},
    )


def a_tensor(
    name: str = "x", dtype: str = "FP32", shape: Sequence[int] = (2, 3), **data: Any
) -> tensor_pb2.Tensor:
    """Of as many zero bytes as its shape asks for, unless there are other data."""
    if not data:
        data = {"raw": bytes(int(np.prod(shape)) * max(BY_NAME[dtype].itemsize, 4))}
    value = BY_NAME[dtype].value
    return tensor_pb2.Tensor(name=name, data_type=value, shape=shape, **data)
