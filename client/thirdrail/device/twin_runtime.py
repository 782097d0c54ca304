# SPDX-License-Identifier: Apache-2.0
"""A client's end of a twin: its memory is host memory, and its streams are whoever calls."""

import ctypes
import os

from thirdrail.device.twin import TwinCounters, TwinMemory, TwinRecord
from thirdrail.errors import Internal
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2

_CPU = 1  # kDLCPU of DLPack


class TwinRuntime:
    """See Runtime."""

    dlpack_device = (_CPU, 0)

    def __init__(self, attached: lane_pb2.DeviceAttached, fds: list[int]) -> None:
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise Internal(f"a twin's events come in 2 descriptors, got {len(fds)}")
        self._places = attached.places
        theirs, ours = fds
        try:
            self._ours = TwinCounters.open(theirs, 2 * attached.places, writable=True)
        except BaseException:
            os.close(ours)
            raise
        self._servers = TwinCounters.open(ours, attached.places, writable=False)

    def open_memory(self, fd: int, nbytes: int) -> TwinMemory:
        return TwinMemory.open(fd, nbytes)

    def record_in_ready(self, place: int, stream: int) -> None:
        self._ours.record(place - 1).set()

    def wait_for_out_done(self, place: int, stream: int) -> TwinRecord | None:
        return self._servers.last_record(place - 1)

    def record_consumed(self, place: int, stream: int) -> None:
        self._ours.record(self._places + place - 1).set()

    def join(self, stream: int, other: int) -> None:
        """Both are whoever calls."""

    def copy_in(self, address: int, array: Array, stream: int) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy_out(self, array: Array, address: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def close(self) -> None:
        self._ours.close()
        self._servers.close()
