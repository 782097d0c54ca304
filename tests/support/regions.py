# SPDX-License-Identifier: Apache-2.0
"""Shared memory as KServe's clients make it, and requests that refer to it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from thirdrail_server.config import RegionLimits
from thirdrail_server.front.kserve.regions import RegionRegistry, RequestRegions
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

SHM = Path("/dev/shm")
Parameter = kserve.InferParameter
Input = kserve.ModelInferRequest.InferInputTensor
Output = kserve.ModelInferRequest.InferRequestedOutputTensor


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


class Regions:
    """The calls about shared memory."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub: Any = GRPCInferenceServiceStub(channel)

    def register(self, name: str, key: str, size: int, offset: int = 0) -> None:
        self.stub.SystemSharedMemoryRegister(
            kserve.SystemSharedMemoryRegisterRequest(
                name=name, key=key, offset=offset, byte_size=size
            )
        )

    def status(self, name: str = "") -> dict[str, Any]:
        request = kserve.SystemSharedMemoryStatusRequest(name=name)
        return dict(self.stub.SystemSharedMemoryStatus(request).regions)

    def unregister(self, name: str = "") -> None:
        self.stub.SystemSharedMemoryUnregister(
            kserve.SystemSharedMemoryUnregisterRequest(name=name)
        )


def files_in_shm(pid: int) -> list[str]:
    """What a process has open of /dev/shm."""
    return [path for path in open_files(pid) if path.startswith(f"{SHM}/")]


def files_outside_arenas(pid: int) -> int:
    """How many file descriptors a process has, but for those of arenas, which grow as they must."""
    return sum(not path.startswith("/memfd:") for path in open_files(pid))


def open_files(pid: int) -> Iterator[str]:
    for each in list(Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # it has been closed since
            yield os.readlink(each)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status and the text that a call fails with."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call was not refused")


def says_taken(register: Callable[[], Any]) -> bool:
    """Whether it is refused because there is a region of that name already."""
    try:
        register()
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise
        return True
    return False


def in_region(name: str, size: int, offset: int | None = None) -> dict[str, Any]:
    """The parameters of a tensor that is in a region."""
    parameters = {
        "shared_memory_region": Parameter(string_param=name),
        "shared_memory_byte_size": Parameter(int64_param=size),
    }
    if offset is not None:
        parameters["shared_memory_offset"] = Parameter(int64_param=offset)
    return parameters


def request_of(
    model: str, *inputs: Input, raw: tuple[bytes, ...] = (), **outputs: Any
) -> kserve.ModelInferRequest:
    """outputs: the parameters of each."""
    wanted = [Output(name=name, parameters=parameters) for name, parameters in outputs.items()]
    return kserve.ModelInferRequest(
        model_name=model, inputs=inputs, outputs=wanted, raw_input_contents=raw, id="r-1"
    )


def identity(kind: str, count: int, where: dict[str, Any], **y: Any) -> kserve.ModelInferRequest:
    """`count` elements of a type, which are in a region. y: the parameters of the output."""
    tensor = Input(name="x", datatype=kind, shape=[count], parameters=where)
    return request_of(f"identity_{kind.lower()}", tensor, **y)


def row(name: str, **fields: Any) -> Input:
    """An input of the models add and plus_one: 16 bytes."""
    return Input(name=name, datatype="FP32", shape=[1, 4], **fields)


def plus_one_in(where: dict[str, Any], *, is_output: bool) -> kserve.ModelInferRequest:
    """A request to the model plus_one whose output, or input, has these parameters."""
    if is_output:
        return request_of("plus_one", row("a"), raw=(bytes(16),), c=where)
    return request_of("plus_one", row("a", parameters=where))
