# SPDX-License-Identifier: Apache-2.0
"""Device memory that another process allocated, by its legacy IPC handle of 64 bytes.

Not yet run on a GPU. Facts are from the driver API's documentation of cuIpcOpenMemHandle: a handle
stands for the whole allocation; one that is opened again is counted; memory that its owner frees
while it is mapped here is undefined; a process cannot open its own. The handle's bytes are written
where the bindings keep them: their attribute for it was dropped in one version.
"""

import contextlib
import ctypes
from typing import TYPE_CHECKING

from thirdrail_engines.engine import DeviceLost, EngineError

if TYPE_CHECKING:
    from thirdrail_engines.cuda.driver import DriverDevice

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class DriverPeerMemory:
    """See PeerMemory."""

    def __init__(self, device: "DriverDevice", handle: bytes) -> None:
        """Raises CudaError for a handle that is none; DeviceLost."""
        assert len(handle) == HANDLE_BYTES
        native = device.names.CUipcMemHandle()
        ctypes.memmove(native.getPtr(), handle, HANDLE_BYTES)
        flags = device.names.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        self._device = device
        self._native = device.call("cuIpcOpenMemHandle", native, int(flags))
        self.address = int(self._native)
        try:
            base, size = device.call("cuMemGetAddressRange", self._native)
        except BaseException:
            with contextlib.suppress(EngineError, DeviceLost):
                self.close()
            raise
        self.nbytes: int = int(base) + size - self.address

    def close(self) -> None:
        self._device.call("cuIpcCloseMemHandle", self._native)
