# SPDX-License-Identifier: Apache-2.0
"""A twin's handle of another process's memory: 64 bytes that name a process and its descriptor."""

import os
import re

from thirdrail.device.twin import TwinMemory
from thirdrail_engines.cuda.device import PinnedMemory
from thirdrail_engines.cuda.errors import error_of
from thirdrail_engines.cuda.twin_memory import Room

HANDLE_BYTES = 64
_CALL = "cuIpcOpenMemHandle"
_HANDLE = re.compile(rb"twin:(\d{1,10}):(\d{1,10})\0*")


def twin_handle(fd: int) -> bytes:
    """Of memory that this process has under `fd`, for as long as it does."""
    return f"twin:{os.getpid()}:{fd}".encode().ljust(HANDLE_BYTES, b"\0")


class TwinPeerMemory:
    """See PeerMemory."""

    def __init__(self, room: Room, handle: bytes) -> None:
        memory = _opened(handle)
        try:
            room.adopt(PinnedMemory(memory.address, memory.view), _CALL)
        except BaseException:
            memory.close()
            raise
        self._room = room
        self._memory = memory
        self.address, self.nbytes = memory.address, memory.nbytes

    def close(self) -> None:
        self._room.let_go(self.address)
        self._memory.close()


def _opened(handle: bytes) -> TwinMemory:
    """Raises CudaError."""
    named = _HANDLE.fullmatch(handle)
    if named is None:
        raise error_of("CUDA_ERROR_INVALID_VALUE", _CALL)
    path = f"/proc/{int(named[1])}/fd/{int(named[2])}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        return TwinMemory.open(fd, os.fstat(fd).st_size)
    except (OSError, ValueError):
        raise error_of("CUDA_ERROR_INVALID_VALUE", _CALL) from None
