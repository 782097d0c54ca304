# SPDX-License-Identifier: Apache-2.0
"""Tensors on the device, as far as requests and responses look at them as they do at arrays."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from thirdrail.tensors import Array


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """A checked place in device memory."""

    address: int
    size: int

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """Elements in device memory, row-major. Whoever computes with them reads them where they are,
    or copies them on the device."""

    address: int
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]

    flags: ClassVar = SimpleNamespace(
        writeable=False, c_contiguous=True
    )  # nothing on the host can write it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)


AnyTensor = Array | DeviceTensor
