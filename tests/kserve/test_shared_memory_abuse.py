# SPDX-License-Identifier: Apache-2.0
"""Shared memory that changes while it is used: shortened, unregistered, given up, without room."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import numpy as np
import pytest

from support.regions import (
    Input,
    Regions,
    SharedMemory,
    files_in_shm,
    files_outside_arenas,
    identity,
    in_region,
    refusal,
    request_of,
    row,
    says_taken,
)
from support.server import RunningServer
from thirdrail.dtypes import Buffer
from thirdrail.errors import InvalidArgument, ResourceExhausted
from thirdrail.lane.aio import Reply
from thirdrail.v1 import inference_pb2, metrics_pb2, metrics_pb2_grpc, tensor_pb2
from thirdrail_server.front.kserve.region_file import RegionFile, open_region
from thirdrail_server.front.kserve.region_outputs import (
    WRITE_ON_LOOP_BYTES_MAX,
    written_to_regions,
)
from thirdrail_server.front.kserve.regions import Region, RegionPart

Status = grpc.StatusCode
MIB = 1 << 20
ROW = np.arange(4, dtype=np.float32)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Unregistered while it is used


def slow_call(server: RunningServer, regions: Regions, turns_count: int = 200_000) -> Any:
    """One that runs for a second or more, with its input and output in the region R."""
    where = in_region("R", 4)
    x = Input(name="x", datatype="FP32", shape=[1], parameters=where)
    turns = Input(name="turns", datatype="INT64", shape=[])
    count = np.array(turns_count, np.int64).tobytes()
    call = regions.stub.ModelInfer.future(request_of("slow", x, turns, raw=(count,), y=where))
    until(lambda: call.done() or running(server) == 1)
    return call


def running(server: RunningServer) -> int:
    with server.channel() as channel:
        figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    return sum(each.running for each in figures.models)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["R", ""])
def test_a_region_in_use_goes_with_the_last_request(
    region_server: RunningServer, regions: Regions, memory: SharedMemory, name: str
) -> None:
    def beside_a_run(turns: int) -> tuple[list[str], bool]:
        """What is listed, and whether its name is taken."""
        memory.write(ROW[1:2].tobytes(), offset=1)
        call = slow_call(region_server, regions, turns)
        regions.unregister(name)
        listed = list(regions.status())
        is_taken = says_taken(lambda: regions.register("R", memory.key, MIB))
        again = request_of("plus_one", row("a", parameters=in_region("R", 16)))
        assert not is_taken or refusal(lambda: regions.stub.ModelInfer(again)) == (
            Status.NOT_FOUND,
            "Unable to find shared memory region: 'R'",
        )
        memory.write(bytes(4), offset=1)
        assert list(call.result().raw_output_contents) == [b""]
        assert memory.read(4, offset=1) == ROW[1:2].tobytes()
        return listed, is_taken

    found = beside_a_run(200_000)
    if found != (["R"], True):  # the run was over before, on a busy machine
        regions.unregister()
        regions.register("R", memory.key, MIB - 1, offset=1)
        found = beside_a_run(2_000_000)
    assert found == (["R"], True)
    assert regions.status() == {}
    assert files_in_shm(region_server.pid) == []


def test_a_region_in_use_goes_with_a_call_that_is_cancelled(
    region_server: RunningServer, regions: Regions, memory: SharedMemory
) -> None:
    call = slow_call(region_server, regions)
    regions.unregister()
    call.cancel()
    until(lambda: not files_in_shm(region_server.pid))
    assert regions.status() == {}
    until(lambda: running(region_server) == 0)


def test_calls_cancelled_at_any_moment_leave_nothing_in_use(
    region_server: RunningServer, regions: Regions
) -> None:
    size = 4 * MIB
    with SharedMemory(size) as source, SharedMemory(size) as target:
        regions.register("in", source.key, size)
        regions.register("out", target.key, size)
        request = identity("UINT8", size, in_region("in", size), y=in_region("out", size))
        for moment in range(100):
            call = regions.stub.ModelInfer.future(request)
            time.sleep(moment / 10_000)
            call.cancel()
        source.write(b"x" * size)
        regions.stub.ModelInfer(request)
        assert target.read() == b"x" * size
        regions.unregister()
        until(lambda: not regions.status())
        until(lambda: not files_in_shm(region_server.pid))


def test_a_thread_never_reads_another_file_than_its_own() -> None:
    """A descriptor's number means another file as soon as it is closed and one is opened."""
    threads_switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with SharedMemory(content=b"a") as one, SharedMemory(content=b"b") as two:
            for _ in range(150):
                file = open_region("N", one.key, owners=None)
                found: list[bytes] = []
                thread = threading.Thread(target=read_until_told, args=(file, found))
                thread.start()
                while not found:
                    time.sleep(0)
                file.close()
                others = [open_region("N", two.key, owners=None) for _ in range(2)]
                thread.join()
                assert set(found) == {b"a"}
                for other in others:
                    other.close()
                assert files_in_shm(os.getpid()) == []
    finally:
        sys.setswitchinterval(threads_switch_s)


def read_until_told(file: RegionFile, found: list[bytes]) -> None:
    target = bytearray(1)
    with suppress(InvalidArgument):
        while True:
            file.read(0, memoryview(target))
            found.append(bytes(target))


def test_memory_without_a_name_any_more_serves_on(regions: Regions, memory: SharedMemory) -> None:
    memory.write(ROW.tobytes(), offset=1)
    os.unlink(memory.path)
    request = request_of("plus_one", row("a", parameters=in_region("R", 16)))
    reply = regions.stub.ModelInfer(request)
    assert list(reply.raw_output_contents) == [(ROW + 1).tobytes()]


def test_two_names_of_one_memory_are_two_regions(regions: Regions, memory: SharedMemory) -> None:
    memory.write(ROW.tobytes(), offset=1)
    regions.register("other", memory.key, 32)
    regions.unregister("R")
    request = request_of("plus_one", row("a", parameters=in_region("other", 16, 1)))
    reply = regions.stub.ModelInfer(request)
    assert list(reply.raw_output_contents) == [(ROW + 1).tobytes()]


class SlowPart(RegionPart):
    """One whose writing ends when the gate is opened."""

    gate = threading.Event()
    began = threading.Event()

    def write(self, output: str, data: Buffer) -> None:
        self.began.set()
        assert self.gate.wait(30)
        super().write(output, data)


async def test_a_cancelled_writing_holds_what_it_reads_and_writes_until_it_has_ended() -> None:
    size = WRITE_ON_LOOP_BYTES_MAX + 1
    response = inference_pb2.InferResponse(outputs=[tensor_pb2.Tensor(name="y")])
    released: list[str] = []
    with SharedMemory(size) as memory:
        file = open_region("N", memory.key, owners=None)
        target = SlowPart(Region("N", memory.key, 0, size, file), 0, size)

        async def call() -> None:
            with ExitStack() as held:
                held.callback(released.append, "released")
                await written_to_regions(Reply(response, [b"x" * size]), {"y": target}, held)

        task = asyncio.create_task(call())
        while not target.began.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert not released
        target.gate.set()
        while not released:
            await asyncio.sleep(0.001)
        assert memory.read() == b"x" * size
        file.close()


# Shortened


SHORTER = "shared memory region 'R' is shorter than when it was registered: expected "


@pytest.mark.parametrize("size", [100, 30_000, MIB - 1])
def test_a_region_that_became_shorter_is_an_error(
    regions: Regions, memory: SharedMemory, size: int
) -> None:
    where = in_region("R", size)
    memory.truncate(51)
    text = f"{SHORTER}{size} bytes at offset 0, got 50"
    assert refusal(lambda: regions.stub.ModelInfer(identity("UINT8", size, where))) == (
        Status.INVALID_ARGUMENT,
        f"[request id: r-1] {text}",
    )
    x = Input(name="x", datatype="UINT8", shape=[size])
    request = request_of("identity_uint8", x, raw=(b"x" * size,), y=where)
    assert refusal(lambda: regions.stub.ModelInfer(request)) == (
        Status.INVALID_ARGUMENT,
        f"[request id: r-1] output 'y': {text}",
    )
    assert memory.read() == bytes(51)
    memory.truncate(MIB)
    assert list(regions.stub.ModelInfer(request).raw_output_contents) == [b""]


@pytest.mark.parametrize(
    ("size", "calls"),
    [
        pytest.param(100, 4000, marks=pytest.mark.slow),
        pytest.param(100_000, 2000, marks=pytest.mark.slow),
        (2 * MIB, 400),
    ],
)
def test_a_region_that_is_shortened_again_and_again(
    region_server: RunningServer, regions: Regions, size: int, calls: int
) -> None:
    front, worker = region_server.pid, region_server.worker_pid()
    regions.status()  # now the channel is connected
    before = files_outside_arenas(front)
    ended = threading.Event()
    with SharedMemory(size) as memory, ThreadPoolExecutor(5) as pool:
        regions.register("R", memory.key, size)
        pool.submit(shorten, memory, size, ended)
        request = identity("UINT8", size, in_region("R", size), y=in_region("R", size))

        def outcome(_: int) -> str:
            try:
                regions.stub.ModelInfer(request)
            except grpc.RpcError as error:
                return f"{error.code()} {error.details()}"
            return "OK"

        outcomes = list(pool.map(outcome, range(calls)))
        ended.set()
    assert "OK" in outcomes
    errors = [each for each in outcomes if each != "OK"]
    assert errors
    for each in errors:
        assert each.startswith("StatusCode.INVALID_ARGUMENT"), each
        assert SHORTER in each
    assert (region_server.pid, region_server.worker_pid()) == (front, worker)
    regions.unregister()
    until(lambda: files_outside_arenas(front) <= before)
    assert "Traceback" not in region_server.log_text()


def shorten(memory: SharedMemory, size: int, ended: threading.Event) -> None:
    while not ended.is_set():
        memory.truncate(0)
        time.sleep(0.0005)
        memory.truncate(size)
        time.sleep(0.002)


def test_a_host_without_memory_is_an_error() -> None:
    file = RegionFile(os.open("/dev/full", os.O_RDWR))
    with pytest.raises(ResourceExhausted, match="cannot be written: No space left on device"):
        file.write(0, b"x")
    file.close()
