# SPDX-License-Identifier: Apache-2.0
"""Tensors in memory of the server's device, as a client has them."""

import math
from typing import Any, NoReturn

import numpy as np

from thirdrail.device.dlpack import capsule
from thirdrail.device.runtime import Runtime
from thirdrail.errors import FailedPrecondition, InvalidArgument
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail.v1.tensor_pb2 import ArenaRef

_CPU = 1  # kDLCPU of DLPack
_LEGACY_STREAM, _PER_THREAD_STREAM = 1, 2  # what DLPack and the CUDA array interface call them


class Block:
    """A piece of device memory that arrays show. It goes back when the last of them is gone.

    stream: on which its elements can be read: what wrote them is ordered before.
    """

    __slots__ = ("__weakref__", "address", "is_released", "owner", "ref", "runtime", "stream")

    def __init__(
        self, owner: object, runtime: Runtime, address: int, stream: int, ref: ArenaRef
    ) -> None:
        """owner: keeps the memory mapped. ref: its first byte, as the server knows it."""
        self.owner = owner
        self.runtime = runtime
        self.address = address
        self.stream = stream
        self.ref = ref
        self.is_released = False


class DeviceResult(Result):
    """A result whose outputs are tensors on the device, or arrays where that was asked for."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a result on the device cannot be pickled; `numpy()` of its arrays can")


class DeviceArray:
    """A tensor on the device, row-major. Made by `Device.empty` or a request.

    Other libraries show it without a copy: `torch.from_dlpack(array)`, `cupy.asarray(array)`. What
    they read and write is ordered on their own stream; see `Device`. The memory goes back when this
    and all views of it are gone.
    """

    __slots__ = ("_offset", "block", "dtype", "shape")

    def __init__(
        self, block: Block, offset: int, shape: tuple[int, ...], dtype: "np.dtype[Any]"
    ) -> None:
        """offset: in bytes, from the start of the block."""
        self.block = block
        self._offset = offset
        self.shape = shape
        self.dtype = dtype

    @property
    def address(self) -> int:
        """Of its first element, in this process. Raises FailedPrecondition after a release."""
        if self.block.is_released:
            raise FailedPrecondition("this array was released: its memory may hold another result")
        return self.block.address + self._offset

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def copy_from(self, array: Any, *, stream: int = 0) -> None:
        """Write the elements of an array on the host. Waits until it is done.

        Raises InvalidArgument for another shape or type.
        """
        source = np.ascontiguousarray(array)
        if tuple(np.shape(array)) != self.shape or source.dtype != self.dtype:
            raise InvalidArgument(
                f"expected {self.dtype} of shape {list(self.shape)}, got {source.dtype} of shape "
                f"{list(np.shape(array))}"
            )
        address = self.address
        if self.nbytes:
            self.block.runtime.copy_in(address, source, stream)

    def numpy(self, *, stream: int | None = None) -> Array:
        """A copy on the host. Waits for the elements.

        stream: what they are ordered on; by default that of the request that made them.
        """
        array = np.empty(self.shape, self.dtype)
        address = self.address
        if self.nbytes:
            self.block.runtime.copy_out(array, address, self._stream(stream))
        return array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.__dlpack_device__()[0] == _CPU:
            raise AttributeError("a twin's memory is no CUDA memory")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.block.stream or _LEGACY_STREAM,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.block.runtime.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """See DLPack. Raises BufferError for a copy, or another device."""
        device = self.__dlpack_device__()
        if copy or (dl_device is not None and tuple(dl_device) != device):
            raise BufferError("only a view on the same device is given; numpy() copies to the host")
        if stream not in (None, -1) and device[0] != _CPU:  # -1: the consumer takes care itself
            asked = 0 if stream == _LEGACY_STREAM else int(stream or 0)
            self.block.runtime.join(asked, self.block.stream)
        return capsule(self.block, self.address, self.shape, self.dtype, device)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype}{list(self.shape)}>"

    def _stream(self, stream: int | None) -> int:
        return self.block.stream if stream is None else stream
