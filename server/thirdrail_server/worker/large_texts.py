# SPDX-License-Identifier: Apache-2.0
"""BYTES inputs that would take too long to be taken apart on the worker's loop: a MiB of short
elements takes 80 ms, in which no other session would be served."""

from dataclasses import dataclass

from thirdrail import dtypes
from thirdrail.dtypes import Buffer
from thirdrail.tensors import Array


@dataclass(frozen=True, slots=True)
class LargeText:
    """The wire form of an input. A run takes it apart, on its own thread."""

    _data: Buffer  # maybe in memory that the caller can write
    _count: int
    _whose: str  # see dtypes.decode_bytes

    def __len__(self) -> int:
        """Bytes."""
        return len(self._data)

    def elements(self, shape: tuple[int, ...]) -> Array:
        """Raises InvalidArgument."""
        # Copied before it is looked at: its lengths are read more than once.
        data = bytes(self._data)
        return dtypes.object_array(dtypes.decode_bytes(data, self._count, self._whose), shape)
