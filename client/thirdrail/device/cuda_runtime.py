# SPDX-License-Identifier: Apache-2.0
"""A client's end of a GPU, by the driver API through cuda.bindings. Not yet run on a GPU.

The device's primary context is used, as torch and others do, and made current for the length of
each call only: the caller's own current device stays what it is.
"""

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator
from typing import Any

from thirdrail.device.virtual_memory import import_allocation, map_allocation, unmap_allocation
from thirdrail.errors import FailedPrecondition, Internal
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2

INSTALL = "pip install 'thirdrail[cuda]'"
HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_CUDA = 2  # kDLCUDA of DLPack


class CudaRuntime:
    """See Runtime."""

    def __init__(self, attached: lane_pb2.DeviceAttached, fds: list[int]) -> None:
        """Raises FailedPrecondition without the bindings, the driver or the device."""
        for fd in fds:  # its events come as handles
            os.close(fd)
        self.names = load_driver()
        self.ordinal = self._ordinal_of(attached.uuid)
        self.dlpack_device = (_CUDA, self.ordinal)
        handle = self._checked("cuDeviceGet", self.ordinal)
        self._context: Any = self._checked("cuDevicePrimaryCtxRetain", handle)
        self._close = weakref.finalize(self, self.names.cuDevicePrimaryCtxRelease, handle)
        places, handles = attached.places, attached.event_handles
        if len(handles) != 3 * places * HANDLE_BYTES:
            raise Internal(
                f"{places} places have 3 events each of {HANDLE_BYTES} bytes, got {len(handles)}"
            )
        events = [
            self._opened(handles[start : start + HANDLE_BYTES])
            for start in range(0, len(handles), HANDLE_BYTES)
        ]
        self._in_ready = events[:places]
        self._out_done = events[places : 2 * places]
        self._consumed = events[2 * places :]

    def call(self, name: str, *arguments: object) -> Any:
        """Raises Internal for whatever the driver answers but success."""
        with self._current():
            return self._checked(name, *arguments)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._checked("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._checked("cuCtxPopCurrent")

    def _checked(self, name: str, *arguments: object) -> Any:
        code, *results = getattr(self.names, name)(*arguments)
        if code:
            raise Internal(f"{name}: {code.name}")
        return results[0] if len(results) == 1 else tuple(results) or None

    def _ordinal_of(self, uuid: str) -> int:
        wanted = uuid.partition("-")[2].replace("-", "")
        count = self._checked("cuDeviceGetCount")
        for ordinal in range(count):
            handle = self._checked("cuDeviceGet", ordinal)
            if self._checked("cuDeviceGetUuid", handle).bytes.hex() == wanted:
                return ordinal
        raise FailedPrecondition(
            f"the server's device {uuid} is none of the {count} that this process sees; look at "
            "CUDA_VISIBLE_DEVICES, and in a container at which devices it was given"
        )

    def _opened(self, handle: bytes) -> Any:
        native = self.names.CUipcEventHandle()
        ctypes.memmove(native.getPtr(), handle, HANDLE_BYTES)
        return self.call("cuIpcOpenEventHandle", native)

    def open_memory(self, fd: int, nbytes: int) -> "CudaMemory":
        return CudaMemory(self, fd, nbytes)

    def record_in_ready(self, place: int, stream: int) -> None:
        self.call("cuEventRecord", self._in_ready[place - 1], stream)

    def wait_for_out_done(self, place: int, stream: int) -> None:
        self.call("cuStreamWaitEvent", stream, self._out_done[place - 1], 0)

    def record_consumed(self, place: int, stream: int) -> None:
        self.call("cuEventRecord", self._consumed[place - 1], stream)

    def join(self, stream: int, other: int) -> None:
        if stream == other:
            return
        event = self.call("cuEventCreate", self.names.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            self.call("cuEventRecord", event, other)
            self.call("cuStreamWaitEvent", stream, event, 0)
        finally:
            self.call("cuEventDestroy", event)

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        self.call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)
        self.call("cuStreamSynchronize", stream)

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)
        self.call("cuStreamSynchronize", stream)

    def close(self) -> None:
        for event in (*self._in_ready, *self._out_done, *self._consumed):
            self.call("cuEventDestroy", event)
        self._close()


class CudaMemory:
    """See Memory."""

    def __init__(self, runtime: CudaRuntime, fd: int, nbytes: int) -> None:
        self._runtime = runtime
        self.nbytes = nbytes
        try:
            handle = import_allocation(runtime, fd)
        finally:
            os.close(fd)
        try:
            self.address = map_allocation(runtime, handle, nbytes)
        finally:
            runtime.call("cuMemRelease", handle)  # the mapping holds the memory

    def close(self) -> None:
        self._runtime.call("cuCtxSynchronize")  # work that was given may still read it
        unmap_allocation(self._runtime, self.address, self.nbytes)


def load_driver() -> Any:
    """cuda.bindings.driver, ready. Raises FailedPrecondition, with what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise FailedPrecondition(
            f"memory on a device needs cuda-bindings in this process. Run: {INSTALL}"
        ) from None
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:  # the class for a missing library depends on the bindings' version
        raise FailedPrecondition(
            f"memory on a device needs the NVIDIA driver's libcuda.so.1 in this process: {error}"
        ) from None
    if code:
        raise FailedPrecondition(f"memory on a device needs a device in this process: {code.name}")
    return driver
