# SPDX-License-Identifier: Apache-2.0
"""What a client does with the device that it shares with its server: a GPU, or a twin in its place.

A stream is its handle, as CUDA has it: 0 is the default stream. The work of a twin's streams is the
caller's own, so copies are done on return, and the caller itself has to wait.
"""

from typing import Protocol

from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2


class Memory(Protocol):
    """A chunk, mapped here."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None:
        """No work of this process may use it any more."""
        ...


class Pending(Protocol):
    """Work of the server's that a caller has to wait for, since no stream does it."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool:
        """timeout: seconds. Whether it is done."""
        ...


class Runtime(Protocol):
    """Places count from 1. All raise Internal for what the device refuses."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Type and number, as DLPack has them."""
        ...

    def open_memory(self, fd: int, nbytes: int) -> Memory:
        """Closes `fd`."""
        ...

    def record_in_ready(self, place: int, stream: int) -> None: ...

    def wait_for_out_done(self, place: int, stream: int) -> Pending | None:
        """The stream's work from now on comes after the server's; None: by itself."""
        ...

    def record_consumed(self, place: int, stream: int) -> None: ...

    def join(self, stream: int, other: int) -> None:
        """The stream's work from now on comes after what the other one was given."""
        ...

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        """Waits until it is done. array: contiguous."""
        ...

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        """Waits until it is done. array: contiguous and writable."""
        ...

    def close(self) -> None: ...


def open_runtime(attached: lane_pb2.DeviceAttached, fds: list[int]) -> Runtime:
    """Takes the descriptors over. Raises FailedPrecondition for what this process lacks, Internal
    for an answer that makes no sense."""
    if attached.kind == lane_pb2.DEVICE_KIND_TWIN:
        from thirdrail.device.twin_runtime import TwinRuntime

        return TwinRuntime(attached, fds)
    from thirdrail.device.cuda_runtime import CudaRuntime

    return CudaRuntime(attached, fds)
