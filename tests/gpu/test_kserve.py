# SPDX-License-Identifier: Apache-2.0
"""KServe's CUDA shared memory on a GPU: handles of memory that this process owns.

Not yet run on a GPU; THIRDRAIL_TEST_TWIN=1 runs it on a twin.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import numpy as np
import pytest

from server.test_lives import until
from support.cuda_regions import CudaRegions, Memory
from support.regions import in_region, refusal, request_of, row
from support.server import RunningServer

Status = grpc.StatusCode
MIB = 1 << 20
TESTS = Path(__file__).parent.parent
ROW = np.arange(4, dtype=np.float32)
MakeMemory = Callable[[int], AbstractContextManager[Memory]]

# Owns memory until it is killed; prints its handle.
OWNER = """
import sys, time
from support.cuda_regions import device_memory
with device_memory(1 << 20) as memory:
    memory.write(bytes(range(256)))
    print(memory.handle.hex(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cuda(gpu_server: RunningServer) -> Iterator[CudaRegions]:
    with gpu_server.channel() as channel:
        calls = CudaRegions(channel)
        yield calls
        calls.unregister()
        assert calls.status() == {}


def plus_one(cuda: CudaRegions, name: str) -> None:
    a = row("a", parameters=in_region(name, 16))
    reply = cuda.stub.ModelInfer(request_of("plus_one", a, c=in_region(name, 16, 512)))
    assert list(reply.raw_output_contents) == [b""]


def test_inputs_and_outputs(cuda: CudaRegions, make_memory: MakeMemory) -> None:
    with make_memory(MIB) as memory:
        memory.write(ROW.tobytes())
        cuda.register("R", memory.handle, MIB)
        for _ in range(3):
            plus_one(cuda, "R")
            assert memory.read(16, 512) == (ROW + 1).tobytes()
            memory.write(bytes(16), 512)
        cuda.unregister("R")


def test_one_allocation_under_two_names(cuda: CudaRegions, make_memory: MakeMemory) -> None:
    with make_memory(MIB) as memory:
        memory.write(ROW.tobytes())
        cuda.register("a", memory.handle, MIB)
        cuda.register("b", memory.handle, 1024)
        cuda.unregister("a")
        plus_one(cuda, "b")
        assert memory.read(16, 512) == (ROW + 1).tobytes()
        cuda.unregister("b")


def test_what_is_no_handle(cuda: CudaRegions, make_memory: MakeMemory) -> None:
    for handle in (bytes(64), b"\xff" * 64, bytes(8)):
        code, text = refusal(lambda handle=handle: cuda.register("N", handle, 16))  # type: ignore[misc]
        assert code is Status.INVALID_ARGUMENT
        assert text.startswith("failed to register shared memory region: invalid args")
    with make_memory(MIB) as memory:
        code, text = refusal(lambda: cuda.register("N", memory.handle, 1 << 40))
        assert code is Status.INVALID_ARGUMENT
        cuda.register("N", memory.handle, 16)
        cuda.unregister()


def test_a_worker_that_is_started_again_opens_it_again(
    gpu_server: RunningServer,
    gpu_worker_pid: Callable[[], int],
    cuda: CudaRegions,
    make_memory: MakeMemory,
) -> None:
    with make_memory(MIB) as memory:
        memory.write(ROW.tobytes())
        cuda.register("R", memory.handle, MIB)
        os.kill(gpu_worker_pid(), signal.SIGKILL)
        until(lambda: can_infer(cuda))
        plus_one(cuda, "R")
        assert memory.read(16, 512) == (ROW + 1).tobytes()
        cuda.unregister()


def test_an_owner_that_is_killed_harms_nobody(cuda: CudaRegions, make_memory: MakeMemory) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
    ) as owner:
        assert owner.stdout is not None
        handle = bytes.fromhex(owner.stdout.readline())
        cuda.register("theirs", handle, MIB)
        owner.kill()
    x = request_of("plus_one", row("a", parameters=in_region("theirs", 16)))
    try:  # undefined by CUDA's documentation, and a matter between them and us
        cuda.stub.ModelInfer(x)
    except grpc.RpcError as error:
        print(error)
    cuda.unregister("theirs")
    until(lambda: can_infer(cuda))
    with make_memory(MIB) as memory:
        memory.write(ROW.tobytes())
        cuda.register("R", memory.handle, MIB)
        plus_one(cuda, "R")
        assert memory.read(16, 512) == (ROW + 1).tobytes()
        cuda.unregister()


def can_infer(cuda: CudaRegions) -> bool:
    request = request_of("plus_one", row("a"), raw=(ROW.tobytes(),))
    try:
        cuda.stub.ModelInfer(request)
    except grpc.RpcError:
        return False
    return True
