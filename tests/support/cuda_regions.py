# SPDX-License-Identifier: Apache-2.0
"""Device memory as KServe's clients own it, on a GPU or a twin, and the calls about it."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

import grpc
import numpy as np

from thirdrail.device.twin import TwinMemory
from thirdrail_engines.cuda.twin_peer_memory import twin_handle
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

made: set[tuple[int, int]] = set()  # devices and inodes, of all that this process had


def times_open(pid: int) -> int:
    """How many of a process's descriptors are of device memory made here."""
    found = 0
    for each in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it has been closed since
            found += _identity(os.stat(each.path)) in made
    return found


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


class DeviceMemory:
    """Whole pages. Its content is read and written as bytes."""

    def __init__(self, size: int) -> None:
        self._memory = TwinMemory.create(size)
        self._fd = self._memory.export()
        self.handle = twin_handle(self._fd)
        self.size = self._memory.nbytes
        made.add(_identity(os.fstat(self._fd)))

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


class Memory(Protocol):
    """handle: 64 bytes for other processes."""

    handle: bytes

    def read(self, size: int, offset: int = 0) -> bytes: ...

    def write(self, content: bytes, offset: int = 0) -> None: ...


class DriverMemory:
    """The same on a GPU, of the first device. Not yet run on a GPU."""

    def __init__(self, size: int) -> None:
        from thirdrail_engines.cuda.driver import open_device

        self._device = open_device(os.environ.get("THIRDRAIL_TEST_UUID", ""))
        self._stream = self._device.new_stream()
        self._address = self._device.allocate(size)
        native = self._device.call("cuIpcGetMemHandle", self._address)
        self.handle = ctypes.string_at(native.getPtr(), 64)

    def read(self, size: int, offset: int = 0) -> bytes:
        got = np.zeros(size, np.uint8)
        self._stream.copy_out(got.ctypes.data, self._address + offset, size)
        self._stream.synchronize()
        return got.tobytes()

    def write(self, content: bytes, offset: int = 0) -> None:
        given = np.frombuffer(content, np.uint8)
        self._stream.copy_in(self._address + offset, given.ctypes.data, len(content))
        self._stream.synchronize()

    def close(self) -> None:
        self._device.free(self._address)
        self._stream.close()
        self._device.close()


@contextlib.contextmanager
def device_memory(size: int) -> Iterator[Memory]:
    """On the twin where THIRDRAIL_TEST_TWIN is set, else on a GPU."""
    if os.environ.get("THIRDRAIL_TEST_TWIN"):
        with DeviceMemory(size) as twin:
            yield twin
        return
    memory = DriverMemory(size)
    try:
        yield memory
    finally:
        memory.close()


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
