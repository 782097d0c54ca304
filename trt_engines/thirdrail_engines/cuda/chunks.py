# SPDX-License-Identifier: Apache-2.0
"""Device memory that two processes map: virtual memory, exported as a file descriptor.

Whoever has the descriptor has the allocation, and nothing else of the process that made it. The
mappings and descriptors hold references: either side may go first, and the memory stays for the
other. Nothing exports it read-only, so a client can spoil its own results, and nobody else's, as
long as each session has chunks of its own. Not yet run on a GPU.

Facts are from the driver API's documentation of virtual memory management.
"""

from typing import Any

from thirdrail.device.virtual_memory import (
    import_allocation,
    location_of,
    map_allocation,
    unmap_allocation,
)
from thirdrail_engines.cuda.driver import DriverDevice
from thirdrail_engines.cuda.sharing import chunk_bytes


class SharedChunk:
    """A piece of a device's memory, mapped into this process. See `create` and `open`."""

    def __init__(self, device: DriverDevice, handle: Any, nbytes: int) -> None:
        """Takes the handle over, also when it raises."""
        self._device = device
        self.nbytes = nbytes
        self.address = 0
        try:
            self.address = map_allocation(device, handle, nbytes)
        except BaseException:
            device.call("cuMemRelease", handle)
            raise
        self._handle = handle

    @classmethod
    def create(cls, device: DriverDevice, nbytes: int) -> "SharedChunk":
        """At least `nbytes`, all zero: what was there before belonged to somebody else.

        Raises OutOfDeviceMemory, CudaError, DeviceLost.
        """
        kind = _kind(device)
        option = device.names.CUmemAllocationGranularity_flags
        granularity: int = device.call(
            "cuMemGetAllocationGranularity",
            kind,
            option.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        )
        size = chunk_bytes(nbytes, granularity)
        chunk = cls(device, device.call("cuMemCreate", size, kind, 0), size)
        try:
            chunk._clear()
        except BaseException:
            chunk.close()
            raise
        return chunk

    @classmethod
    def open(cls, device: DriverDevice, fd: int, nbytes: int) -> "SharedChunk":
        """The other side's: `fd` came from `export` and stays the caller's.

        nbytes: as the other side's chunk has it. Raises CudaError where it is none of such.
        """
        return cls(device, import_allocation(device, fd), nbytes)

    def export(self) -> int:
        """A new file descriptor of the allocation, which the caller sends and closes."""
        types = self._device.names.CUmemAllocationHandleType
        fd: int = self._device.call(
            "cuMemExportToShareableHandle",
            self._handle,
            types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            0,
        )
        return fd

    def close(self) -> None:
        """No work of this process may use it any more. Others' mappings stay."""
        unmap_allocation(self._device, self.address, self.nbytes)
        self._device.call("cuMemRelease", self._handle)

    def _clear(self) -> None:
        stream = self._device.new_stream()
        try:
            stream.fill(self.address, self.nbytes)
            stream.synchronize()
        finally:
            stream.close()


def _kind(device: DriverDevice) -> Any:
    names = device.names
    kind = names.CUmemAllocationProp()
    kind.type = names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kind.requestedHandleTypes = (
        names.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    )
    kind.location = location_of(device)
    return kind
