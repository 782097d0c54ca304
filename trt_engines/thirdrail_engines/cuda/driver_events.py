# SPDX-License-Identifier: Apache-2.0
"""A device's events of two processes, as legacy IPC handles of 64 bytes. Not yet run on a GPU.

The handle's bytes are read where the bindings keep them: their attribute for it was dropped in one
version.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thirdrail_engines.cuda.driver_streams import DriverEvent
from thirdrail_engines.engine import DeviceLost, EngineError

if TYPE_CHECKING:
    from thirdrail_engines.cuda.driver import DriverDevice

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class DriverEvents:
    """See SharedEvents. All are made at once: making and opening can block a busy device."""

    def __init__(self, device: "DriverDevice", places: int) -> None:
        self._made: list[DriverEvent] = []
        handles = []
        try:
            for _ in range(3 * places):
                event = DriverEvent(device, is_shared=True)
                self._made.append(event)
                handle = device.call("cuIpcGetEventHandle", event.native)
                handles.append(ctypes.string_at(handle.getPtr(), HANDLE_BYTES))
        except BaseException:
            with contextlib.suppress(EngineError, DeviceLost):
                self.close()
            raise
        self.handles = b"".join(handles)
        self.in_ready: Sequence[DriverEvent] = self._made[:places]
        self.out_done: Sequence[DriverEvent] = self._made[places : 2 * places]
        self.consumed: Sequence[DriverEvent] = self._made[2 * places :]

    def export(self) -> list[int]:
        return []

    def close(self) -> None:
        while self._made:
            self._made.pop().close()
