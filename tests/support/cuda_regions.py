# SPDX-License-Identifier: Apache-2.0
"""Device memory as KServe's clients own it, on a twin, and the calls about it."""

import contextlib
import os
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from thirdrail.device.twin import TwinMemory
from thirdrail_engines.cuda.twin_peer_memory import twin_handle
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

made: set[int] = set()  # inodes, of all that this process had


def times_open(pid: int) -> int:
    """How many of a process's descriptors are of device memory made here."""
    found = 0
    for each in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it has been closed since
            found += os.stat(each.path).st_ino in made
    return found


class DeviceMemory:
    """Whole pages. Its content is read and written as bytes."""

    def __init__(self, size: int) -> None:
        self._memory = TwinMemory.create(size)
        self._fd = self._memory.export()
        self.handle = twin_handle(self._fd)
        self.size = self._memory.nbytes
        made.add(os.fstat(self._fd).st_ino)

    def read(self, size: int, offset: int = 0) -> bytes:
        return bytes(self._memory.view[offset : offset + size])

    def write(self, content: bytes, offset: int = 0) -> None:
        self._memory.view[offset : offset + len(content)] = np.frombuffer(content, np.uint8)

    def __enter__(self) -> "DeviceMemory":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._memory.close()
        self.close_handle()

    def close_handle(self) -> None:
        """Nobody can open it any more; who has it open keeps it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CudaRegions:
    """The calls about CUDA shared memory."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub: Any = GRPCInferenceServiceStub(channel)

    def register(self, name: str, handle: bytes, size: int, device_id: int = 0) -> None:
        self.stub.CudaSharedMemoryRegister(
            kserve.CudaSharedMemoryRegisterRequest(
                name=name, raw_handle=handle, device_id=device_id, byte_size=size
            )
        )

    def status(self, name: str = "") -> dict[str, Any]:
        request = kserve.CudaSharedMemoryStatusRequest(name=name)
        return dict(self.stub.CudaSharedMemoryStatus(request).regions)

    def unregister(self, name: str = "") -> None:
        self.stub.CudaSharedMemoryUnregister(kserve.CudaSharedMemoryUnregisterRequest(name=name))
