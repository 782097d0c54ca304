# SPDX-License-Identifier: Apache-2.0
"""The best classes of a result as text, as KServe's classification extension has it.

Each element is "value:index" or, where the model has labels, "value:index:label", with the value
printed by C's %f; largest first, the lower index first among equals.
"""

from collections.abc import Sequence

import numpy as np

from thirdrail import dtypes
from thirdrail.errors import InvalidArgument
from thirdrail.tensors import Array

ELEMENTS_MAX = 1_000_000


def classify(array: Array, count: int, labels: Sequence[str], batch_rows_max: int) -> Array:
    """[rows, ...] -> [rows, min(count, classes)] of BYTES; without batching the first axis is not
    rows and the result has one axis.

    Raises InvalidArgument when the result would have more than ELEMENTS_MAX elements.
    """
    rows = array.reshape(array.shape[0], -1) if batch_rows_max else array.reshape(1, -1)
    count = min(count, rows.shape[1])
    if rows.shape[0] * count > ELEMENTS_MAX:
        raise InvalidArgument("classification output tensor too large")
    elements: list[bytes] = []
    for row in rows:
        order = np.argsort(-row.astype(np.float64), kind="stable")[:count]
        elements += [_element(row[index], int(index), labels) for index in order]
    shape = (rows.shape[0], count) if batch_rows_max else (count,)
    return dtypes.object_array(elements, shape)


def _element(value: object, index: int, labels: Sequence[str]) -> bytes:
    text = f"{float(value):f}:{index}"  # type: ignore[arg-type]
    return (f"{text}:{labels[index]}" if index < len(labels) else text).encode()
