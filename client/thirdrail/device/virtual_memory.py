# SPDX-License-Identifier: Apache-2.0
"""Allocations of CUDA's virtual memory management, mapped into this process. Both ends of shared
device memory do it alike. Not yet run on a GPU.

Facts are from the driver API's documentation of virtual memory management.
"""

from typing import Any, Protocol


class Driver(Protocol):
    """The driver API with a device's context, every result checked."""

    def call(self, name: str, *arguments: object) -> Any: ...

    @property
    def names(self) -> Any:
        """cuda.bindings.driver."""
        ...

    @property
    def ordinal(self) -> int:
        """What this process's driver calls the device."""
        ...


def import_allocation(driver: Driver, fd: int) -> Any:
    """The handle of what `fd`, which stays the caller's, was exported from."""
    types = driver.names.CUmemAllocationHandleType
    return driver.call(
        "cuMemImportFromShareableHandle",
        fd,
        types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
    )


def location_of(driver: Driver) -> Any:
    location = driver.names.CUmemLocation()
    location.type = driver.names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = driver.ordinal
    return location


def map_allocation(driver: Driver, handle: Any, nbytes: int) -> int:
    """Its address here, to read and write. Leaves nothing behind when it raises."""
    access = driver.names.CUmemAccessDesc()
    access.location = location_of(driver)
    access.flags = driver.names.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    address = int(driver.call("cuMemAddressReserve", nbytes, 0, 0, 0))
    try:
        driver.call("cuMemMap", address, nbytes, 0, handle, 0)
    except BaseException:
        driver.call("cuMemAddressFree", address, nbytes)
        raise
    try:
        driver.call("cuMemSetAccess", address, nbytes, [access], 1)
    except BaseException:
        unmap_allocation(driver, address, nbytes)
        raise
    return address


def unmap_allocation(driver: Driver, address: int, nbytes: int) -> None:
    driver.call("cuMemUnmap", address, nbytes)
    driver.call("cuMemAddressFree", address, nbytes)
