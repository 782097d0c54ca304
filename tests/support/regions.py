# SPDX-License-Identifier: Apache-2.0
"""Shared memory as KServe's clients make it, and requests that refer to it."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from thirdrail_server.config import RegionLimits
from thirdrail_server.front.kserve.regions import RegionRegistry, RequestRegions
from thirdrail_server.inference import grpc_service_pb2 as kserve

SHM = Path("/dev/shm")
Parameter = kserve.InferParameter


def no_regions() -> RequestRegions:
    """A request's regions, on a server that has none."""
    return RequestRegions(RegionRegistry(RegionLimits(), is_enabled=False, owners=None))


class SharedMemory:
    """A file in /dev/shm, gone on leaving. Its content is read and written as bytes."""

    def __init__(self, size: int = 0, *, content: bytes = b"", key: str = "") -> None:
        self.key = key or f"/tr_test_{os.getpid()}_{os.urandom(4).hex()}"
        self.path = SHM / self.key.lstrip("/")
        self.path.touch(mode=0o600, exist_ok=False)
        self.write(content)
        os.truncate(self.path, max(size, len(content)))

    def read(self, size: int = -1, offset: int = 0) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def write(self, content: bytes, offset: int = 0) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def truncate(self, size: int) -> None:
        os.truncate(self.path, size)

    def __enter__(self) -> "SharedMemory":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.path.unlink(missing_ok=True)


def in_region(name: str, size: int, offset: int | None = None) -> dict[str, Any]:
    """The parameters of a tensor that is in a region."""
    parameters = {
        "shared_memory_region": Parameter(string_param=name),
        "shared_memory_byte_size": Parameter(int64_param=size),
    }
    if offset is not None:
        parameters["shared_memory_offset"] = Parameter(int64_param=offset)
    return parameters
