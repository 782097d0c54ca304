# SPDX-License-Identifier: Apache-2.0
"""Registering shared memory with a real server: what is taken, and the text of every refusal."""

import fcntl
import os
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.regions import SHM, Regions, SharedMemory, files_in_shm, refusal
from support.server import RunningServer
from thirdrail.errors import PermissionDenied
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc
from thirdrail_server.config import RegionLimits
from thirdrail_server.front.kserve.region_file import open_region
from thirdrail_server.inference import grpc_service_pb2 as kserve

Status = grpc.StatusCode
PAGE = 4096


# Registering


def test_a_region_is_shown_until_it_is_unregistered(regions: Regions) -> None:
    no_slash = f"tr_test_{os.getpid()}_no_slash"
    with SharedMemory(3 * PAGE) as one, SharedMemory(PAGE, key=no_slash) as two:
        regions.register("one", one.key, PAGE + 5, offset=1)  # offsets need no alignment here
        regions.register("two", two.key, PAGE)
        shown = kserve.SystemSharedMemoryStatusResponse.RegionStatus
        expected = {
            "one": shown(name="one", key=one.key, offset=1, byte_size=PAGE + 5),
            "two": shown(name="two", key=no_slash, byte_size=PAGE),
        }
        assert regions.status() == expected
        assert regions.status("one") == {"one": expected["one"]}
        regions.unregister("one")
        assert list(regions.status()) == ["two"]
        regions.unregister("one")  # nothing is there to be done
        regions.unregister()
        assert regions.status() == {}


def test_the_same_memory_may_have_many_names_and_one_name_only_one_memory(regions: Regions) -> None:
    with SharedMemory(PAGE) as memory:
        regions.register("a", memory.key, PAGE)
        regions.register("b", memory.key, PAGE)
        assert refusal(lambda: regions.register("a", memory.key, PAGE)) == (
            Status.ALREADY_EXISTS,
            "shared memory region 'a' already in manager",
        )


def test_another_client_sees_and_unregisters_the_regions(
    region_server: RunningServer, regions: Regions
) -> None:
    with SharedMemory(PAGE) as memory, region_server.channel(tcp=True) as channel:
        regions.register("a", memory.key, PAGE)
        other = Regions(channel)
        assert list(other.status()) == ["a"]
        other.unregister("a")
        assert regions.status() == {}


@pytest.mark.parametrize("key", ["", "/", "//", "//a", "/a/b", "../shm/a", ".", "/..", "a b", "ä"])
def test_a_key_that_names_no_object_of_shared_memory(regions: Regions, key: str) -> None:
    assert refusal(lambda: regions.register("N", key, 8)) == (
        Status.INVALID_ARGUMENT,
        f"cannot register shared memory region 'N' - invalid shm key '{key}'",
    )


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("/triton_python_backend_shm_region_1", "triton_python_backend_shm_region_"),
        ("///triton_python_backend_shm_region_1", "triton_python_backend_shm_region_"),
        ("thirdrail_x", "thirdrail_"),
        ("/sem.x", "sem."),
    ],
)
def test_a_key_of_somebody_elses_objects(regions: Regions, key: str, prefix: str) -> None:
    assert refusal(lambda: regions.register("N", key, 8)) == (
        Status.INVALID_ARGUMENT,
        f"cannot register shared memory region 'N' with key '{key}' as the key contains the "
        f"reserved prefix '{prefix}'",
    )


def test_keys_of_every_allowed_character_and_length(regions: Regions) -> None:
    key = "/" + f"aZ9._-{os.getpid()}".ljust(200, "x")
    with SharedMemory(PAGE, key=key):
        regions.register("N", key, PAGE)
    code, text = refusal(lambda: regions.register("longer", f"{key}x", PAGE))
    assert (code, "invalid shm key" in text) == (Status.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("name", ["", "x" * (RegionLimits().name_chars_max + 1)])
def test_names_have_a_bound(regions: Regions, name: str) -> None:
    code, text = refusal(lambda: regions.register(name, "/key", 8))
    assert code is Status.INVALID_ARGUMENT
    assert text.endswith(f"must have 1 to 256 characters, got {len(name)}")


def test_memory_that_is_not_there(regions: Regions) -> None:
    assert refusal(lambda: regions.register("N", "/tr_test_missing", 8)) == (
        Status.INTERNAL,
        "Unable to open shared memory region: '/tr_test_missing' (No such file or directory)",
    )


@pytest.mark.parametrize("kind", ["link", "folder", "socket", "pipe", "lease"])
def test_what_is_no_plain_file_of_the_owners(regions: Regions, kind: str) -> None:
    path = SHM / f"tr_test_{os.getpid()}_{kind}"
    with SharedMemory(PAGE) as memory, SpecialFile(kind, path, memory):
        code, text = refusal(lambda: regions.register("N", f"/{path.name}", PAGE))
    if kind == "pipe":
        assert code is Status.INVALID_ARGUMENT
        assert text.endswith(f"'/{path.name}' is not a plain file")
    else:
        assert code is Status.INTERNAL
        assert text.startswith(f"Unable to open shared memory region: '/{path.name}' (")


class SpecialFile:
    """Something else than a plain file at `path`, or one that is held against being opened."""

    def __init__(self, kind: str, path: Path, memory: SharedMemory) -> None:
        self._path = path
        self._file: Any = None
        if kind == "link":
            path.symlink_to(memory.path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            self._file = socket.socket(socket.AF_UNIX)
            self._file.bind(str(path))
        else:  # whoever opens it is made to wait for 45 s, unless it says that it does not wait
            self._file = path.open("xb")
            path.open("r+b").close()
            self._sigio = signal.signal(signal.SIGIO, signal.SIG_IGN)
            fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._path.is_dir():
            self._path.rmdir()
        else:
            self._path.unlink()


def test_memory_of_somebody_else() -> None:
    with SharedMemory(PAGE) as memory:
        with pytest.raises(PermissionDenied) as caught:
            open_region("N", memory.key, owners=(4711, 4712))
        assert caught.value.message == (
            f"cannot register shared memory region 'N': '{memory.key}' belongs to user "
            f"{os.getuid()}, expected 4711 or 4712"
        )
        assert files_in_shm(os.getpid()) == []
        open_region("N", memory.key, owners=None).close()
        open_region("N", memory.key, owners=(os.getuid(),)).close()
        assert files_in_shm(os.getpid()) == []


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, PAGE + 1),
        (1, PAGE),
        (PAGE, 1),
        (0, 0),
        (0, (1 << 64) - 1),
        ((1 << 64) - 8, 16),  # the sum of these is 8 where sums wrap around
        ((1 << 64) - 1, (1 << 64) - 1),
    ],
)
def test_more_than_the_memory_has(regions: Regions, offset: int, size: int) -> None:
    with SharedMemory(PAGE) as memory:
        assert refusal(lambda: regions.register("N", memory.key, size, offset)) == (
            Status.INVALID_ARGUMENT,
            "failed to register shared memory region 'N': invalid args",
        )
    assert regions.status() == {}


def test_as_many_regions_as_are_allowed(region_server: RunningServer, regions: Regions) -> None:
    most = RegionLimits().regions_max
    with SharedMemory(PAGE) as memory, region_server.channel() as channel:
        for number in range(most):
            regions.register(f"n{number}", memory.key, 16)
        code, text = refusal(lambda: regions.register("N", memory.key, 16))
        assert (code, text.endswith(f"there are {most}, the most that this server allows")) == (
            Status.UNAVAILABLE,
            True,
        )
        figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
        assert (figures.regions, figures.region_bytes) == (most, 16 * most)
        regions.unregister("n7")
        regions.register("N", memory.key, 16)
        assert len(files_in_shm(region_server.pid)) == most


# Status and CUDA


def test_the_status_of_a_region_that_is_not_there(regions: Regions) -> None:
    assert refusal(lambda: regions.status("N")) == (
        Status.NOT_FOUND,
        "Unable to find system shared memory region: 'N'",
    )


def test_cuda_answers_as_on_a_host_without_a_gpu(regions: Regions) -> None:
    stub = regions.stub
    ask = kserve.CudaSharedMemoryRegisterRequest(name="C", raw_handle=bytes(64), byte_size=8)
    assert refusal(lambda: stub.CudaSharedMemoryRegister(ask)) == (
        Status.INVALID_ARGUMENT,
        "failed to register CUDA shared memory region: 'C', GPUs not supported",
    )
    for name in ("", "C"):
        stub.CudaSharedMemoryUnregister(kserve.CudaSharedMemoryUnregisterRequest(name=name))
    status = kserve.CudaSharedMemoryStatusRequest
    assert not stub.CudaSharedMemoryStatus(status()).regions
    assert refusal(lambda: stub.CudaSharedMemoryStatus(status(name="C"))) == (
        Status.NOT_FOUND,
        "Unable to find cuda shared memory region: 'C'",
    )
    with SharedMemory(PAGE) as memory:
        regions.register("S", memory.key, PAGE)
        assert refusal(lambda: stub.CudaSharedMemoryStatus(status(name="S"))) == (
            Status.NOT_FOUND,
            "The region named 'S' is registered as system shared memory, not CUDA shared memory",
        )
        stub.CudaSharedMemoryUnregister(kserve.CudaSharedMemoryUnregisterRequest(name="S"))
        stub.CudaSharedMemoryUnregister(kserve.CudaSharedMemoryUnregisterRequest())
        assert list(regions.status()) == ["S"]


def test_the_server_says_that_it_has_regions(regions: Regions) -> None:
    metadata = regions.stub.ServerMetadata(kserve.ServerMetadataRequest())
    assert "system_shared_memory" in metadata.extensions
    assert "cuda_shared_memory" not in metadata.extensions
