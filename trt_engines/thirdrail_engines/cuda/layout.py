# SPDX-License-Identifier: Apache-2.0
"""Several tensors in one block of memory: one copy moves them all. Pure code."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES
from thirdrail_engines.plans import Shape


@dataclass(frozen=True, slots=True)
class Layout:
    """offsets, sizes: by tensor, in bytes. total_bytes: at least 1, for a block of none is none."""

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    total_bytes: int


def lay_out(tensors: Iterable[TensorSpec], shapes: Mapping[str, Shape]) -> Layout:
    """Place the tensors that have a shape one after the other, each where a device wants it.

    An empty tensor has a place as well: a null address means something else to a program.
    """
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        if tensor.name not in shapes:
            continue
        size = math.prod(shapes[tensor.name]) * tensor.dtype.itemsize
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        offsets[tensor.name], sizes[tensor.name] = start, size
        end = start + max(size, 1)
    return Layout(offsets, sizes, max(end, 1))
