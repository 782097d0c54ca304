# SPDX-License-Identifier: Apache-2.0
"""KServe's CUDA shared memory on a real server, whose one GPU is a twin: a handle names a memfd.

The worker of the device opens what clients register; the front never does.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from server.test_lives import until
from support.cuda_regions import CudaRegions, DeviceMemory, times_open
from support.models import BATCHED_CONFIG, add, gather, identity, slow, write
from support.regions import (
    Input,
    Regions,
    SharedMemory,
    in_region,
    plus_one_in,
    refusal,
    request_of,
    row,
    says_taken,
)
from support.server import RunningServer, running_server
from thirdrail.v1 import metrics_pb2, metrics_pb2_grpc
from thirdrail_engines.cuda.twin import TWIN_FACTS
from thirdrail_server.inference import grpc_service_pb2 as kserve

Status = grpc.StatusCode
MIB = 1 << 20
PAGE = 4096
ROW = np.arange(4, dtype=np.float32)
INVALID = "failed to register shared memory region: invalid args: region 'N': "


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    repository = tmp_path_factory.mktemp("models")
    write(repository, "identity", identity("UINT8"))
    write(repository, "words", identity("BYTES"))
    write(repository, "add", add(), BATCHED_CONFIG)
    write(repository, "plus_one", add(1))
    write(repository, "slow", slow())
    write(repository, "twin_gather", gather())  # on the engine for devices
    write(repository, "on_cpu", add(1), "instance_group { kind: KIND_CPU }")
    with running_server(
        repository,
        tmp_path_factory.mktemp("server"),
        ["--allow-client-shm"],
        module="support.twin_gpu_server",
    ) as running:
        yield running


@pytest.fixture
def cuda(server: RunningServer) -> Iterator[CudaRegions]:
    """What a test has registered is unregistered, and nobody has it open any more."""
    with server.channel() as channel:
        calls = CudaRegions(channel)
        yield calls
        calls.unregister()
        Regions(channel).unregister()
        assert calls.status() == {}
        until(lambda: regions_open(server) == 0)


@pytest.fixture
def memory(cuda: CudaRegions) -> Iterator[DeviceMemory]:
    """1 MiB, registered as "R"."""
    with DeviceMemory(MIB) as made:
        cuda.register("R", made.handle, MIB)
        yield made


def worker_of(server: RunningServer) -> Any:
    with server.channel() as channel:
        figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    return next(each for each in figures.workers if each.name == f"cuda:{TWIN_FACTS.uuid}")


def regions_open(server: RunningServer) -> int:
    """How often the worker has memory of this process open."""
    return times_open(worker_of(server).pid)


def region(name: str, size: int, device_id: int = 0) -> Any:
    shown = kserve.CudaSharedMemoryStatusResponse.RegionStatus
    return shown(name=name, device_id=device_id, byte_size=size)


# Registering


def test_a_region_is_shown_until_it_is_unregistered(
    server: RunningServer, cuda: CudaRegions
) -> None:
    with DeviceMemory(2 * PAGE) as memory:
        cuda.register("a", memory.handle, PAGE + 1)
        cuda.register("b", memory.handle, 1)
        assert regions_open(server) > 0
        assert times_open(server.pid) == 0  # the front's
        assert cuda.status() == {"a": region("a", PAGE + 1), "b": region("b", 1)}
        assert cuda.status("b") == {"b": region("b", 1)}
        cuda.unregister("a")
        cuda.unregister("a")  # nothing is there to be done
        assert list(cuda.status()) == ["b"]
        cuda.unregister()
        assert cuda.status() == {}
        until(lambda: regions_open(server) == 0)


def test_a_name_is_taken_once_whatever_the_kind(cuda: CudaRegions) -> None:
    with DeviceMemory(PAGE) as memory, SharedMemory(PAGE) as system:
        cuda.register("N", memory.handle, PAGE)
        taken = (Status.ALREADY_EXISTS, "shared memory region 'N' already in manager")
        assert refusal(lambda: cuda.register("N", memory.handle, PAGE)) == taken
        ask = kserve.SystemSharedMemoryRegisterRequest(name="N", key=system.key, byte_size=8)
        assert refusal(lambda: cuda.stub.SystemSharedMemoryRegister(ask)) == taken


def test_each_kind_leaves_the_other_alone(server: RunningServer, cuda: CudaRegions) -> None:
    with server.channel() as channel, DeviceMemory(PAGE) as memory, SharedMemory(PAGE) as system:
        regions = Regions(channel)
        cuda.register("C", memory.handle, PAGE)
        regions.register("S", system.key, PAGE)
        assert (list(cuda.status()), list(regions.status())) == (["C"], ["S"])
        assert refusal(lambda: cuda.status("S")) == (
            Status.NOT_FOUND,
            "The region named 'S' is registered as system shared memory, not CUDA shared memory",
        )
        assert refusal(lambda: regions.status("C")) == (
            Status.NOT_FOUND,
            "The region named 'C' is registered as CUDA shared memory, not system shared memory",
        )
        cuda.unregister("S")
        regions.unregister("C")
        assert (list(cuda.status()), list(regions.status())) == (["C"], ["S"])
        regions.unregister()
        assert (list(cuda.status()), list(regions.status())) == (["C"], [])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"handle": b""}, "its raw_handle has 0 bytes, expected 64"),
        ({"handle": bytes(63)}, "its raw_handle has 63 bytes, expected 64"),
        ({"handle": bytes(65)}, "its raw_handle has 65 bytes, expected 64"),
        ({"handle": bytes(64)}, "cuIpcOpenMemHandle: invalid value"),
        ({"handle": b"\xff" * 64}, "cuIpcOpenMemHandle: invalid value"),
        ({"handle": b"twin:1:0".ljust(64, b"\0")}, "cuIpcOpenMemHandle: invalid value"),
        ({"size": PAGE + 1}, "the memory has 4096 bytes, 4097 were registered"),
        ({"size": 0}, "the memory has 4096 bytes, 0 were registered"),
        ({"size": 1 << 63}, f"the memory has 4096 bytes, {1 << 63} were registered"),
        ({"device_id": 1}, "device_id 1, expected 0 to 0"),
        ({"device_id": -1}, "device_id -1, expected 0 to 0"),
    ],
    ids=str,
)
def test_what_cannot_be_registered(
    server: RunningServer, cuda: CudaRegions, change: dict[str, Any], text: str
) -> None:
    with DeviceMemory(PAGE) as memory:
        arguments: Any = {"handle": memory.handle, "size": PAGE, **change}
        assert refusal(lambda: cuda.register("N", **arguments)) == (
            Status.INVALID_ARGUMENT,
            INVALID + text,
        )
        assert cuda.status() == {}
        assert regions_open(server) == 0
        cuda.register("N", memory.handle, PAGE)  # the name is free


def test_metadata_says_that_it_is_served(cuda: CudaRegions) -> None:
    metadata = cuda.stub.ServerMetadata(kserve.ServerMetadataRequest())
    assert {"system_shared_memory", "cuda_shared_memory"} <= set(metadata.extensions)


# Tensors


@pytest.mark.parametrize("count", [0, 3, 60_000])
@pytest.mark.parametrize("stream", [False, True])
def test_tensors_are_read_and_written_there(
    cuda: CudaRegions, memory: DeviceMemory, count: int, stream: bool
) -> None:
    raw = np.random.default_rng(count).bytes(count)
    memory.write(b"abc" + raw)
    x = Input(name="x", datatype="UINT8", shape=[count], parameters=in_region("R", count, 3))
    request = request_of("identity", x, y=in_region("R", count + 50, 500_001))
    if stream:
        (message,) = cuda.stub.ModelStreamInfer(iter([request]))
        assert not message.error_message
        reply = message.infer_response
    else:
        reply = cuda.stub.ModelInfer(request)
    assert memory.read(count + 2, 500_000) == b"\0" + raw + b"\0"
    (output,) = reply.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "UINT8", [count])
    assert list(reply.raw_output_contents) == [b""]
    assert not output.parameters


def test_on_the_engine_for_devices(cuda: CudaRegions, memory: DeviceMemory) -> None:
    memory.write(np.array([3, 0], np.int64).tobytes(), 8)
    index = Input(name="index", datatype="INT64", shape=[2], parameters=in_region("R", 16, 8))
    reply = cuda.stub.ModelInfer(request_of("twin_gather", index, y=in_region("R", 8, 1024)))
    assert list(reply.raw_output_contents) == [b""]
    assert np.frombuffer(memory.read(8, 1024), np.float32).tolist() == [13, 10]


def test_regions_of_both_kinds_and_the_request_itself_in_one_call(
    server: RunningServer, cuda: CudaRegions, memory: DeviceMemory
) -> None:
    memory.write((ROW * 10).tobytes())
    with server.channel() as channel, SharedMemory(PAGE) as system:
        regions = Regions(channel)
        regions.register("S", system.key, PAGE)
        inputs = [row("a", parameters=in_region("R", 16)), row("b")]
        request = request_of("add", *inputs, raw=(ROW.tobytes(),), c=in_region("S", 16, 32))
        assert list(cuda.stub.ModelInfer(request).raw_output_contents) == [b""]
        assert system.read(16, 32) == (ROW * 11).tobytes()
        request = request_of("add", *inputs, raw=(ROW.tobytes(),))
        reply = cuda.stub.ModelInfer(request)
        assert list(reply.raw_output_contents) == [(ROW * 11).tobytes()]
        regions.unregister()


def test_batched_calls_get_their_own(cuda: CudaRegions, memory: DeviceMemory) -> None:
    calls = []
    for number in range(40):
        memory.write((ROW * number).tobytes(), 16 * number)
        inputs = [
            row("a", parameters=in_region("R", 16, 16 * number)),
            row("b", parameters=in_region("R", 16, 16)),
        ]
        request = request_of("add", *inputs, c=in_region("R", 16, 4096 + 16 * number))
        calls.append(cuda.stub.ModelInfer.future(request))
    for number, call in enumerate(calls):
        assert list(call.result().raw_output_contents) == [b""]
        assert memory.read(16, 4096 + 16 * number) == (ROW * (number + 1)).tobytes()


@pytest.mark.parametrize(
    ("offset", "size", "text"),
    [
        (MIB, 0, "Invalid offset for shared memory region: 'R'"),
        (-1, 16, "Invalid offset for shared memory region: 'R'"),
        (MIB - 15, 16, "Invalid offset + byte size for shared memory region: 'R'"),
        (0, -1, "Invalid offset + byte size for shared memory region: 'R'"),
        (32, -32, "Integer overflow detected: byte_size (18446744073709551584) and offset (32) "),
    ],
)
@pytest.mark.parametrize("output", [False, True])
def test_what_is_outside_the_region(
    cuda: CudaRegions, memory: DeviceMemory, offset: int, size: int, text: str, output: bool
) -> None:
    request = plus_one_in(in_region("R", size, offset), is_output=output)
    code, message = refusal(lambda: cuda.stub.ModelInfer(request))
    assert code is Status.INVALID_ARGUMENT
    assert message.startswith(f"[request id: r-1] {text}")


def test_sizes_that_do_not_fit_and_text(cuda: CudaRegions, memory: DeviceMemory) -> None:
    request = request_of("plus_one", row("a", parameters=in_region("R", 20)))
    assert refusal(lambda: cuda.stub.ModelInfer(request)) == (
        Status.INVALID_ARGUMENT,
        "[request id: r-1] input byte size mismatch for input 'a' for model 'plus_one'. Expected "
        "16, got 20",
    )
    request = request_of("plus_one", row("a"), raw=(ROW.tobytes(),), c=in_region("R", 15))
    assert refusal(lambda: cuda.stub.ModelInfer(request)) == (
        Status.INTERNAL,
        "shared memory size specified with the request for output 'c' (15 bytes) "
        "should be at least 16 bytes to hold the results",
    )
    words = Input(name="x", datatype="BYTES", shape=[1], parameters=in_region("R", 5))
    code, text = refusal(lambda: cuda.stub.ModelInfer(request_of("words", words)))
    assert code is Status.INVALID_ARGUMENT
    assert "input 'x' for model 'words' is BYTES, which are read on the host" in text
    words = Input(name="x", datatype="BYTES", shape=[1])
    request = request_of("words", words, raw=(b"\1\0\0\0x",), y=in_region("R", 64))
    assert list(cuda.stub.ModelInfer(request).raw_output_contents) == [b""]
    assert memory.read(6) == b"\1\0\0\0x\0"


def test_a_model_without_the_device_is_refused_by_name(
    cuda: CudaRegions, memory: DeviceMemory
) -> None:
    request = request_of("on_cpu", row("a", parameters=in_region("R", 16)))
    assert refusal(lambda: cuda.stub.ModelInfer(request)) == (
        Status.INVALID_ARGUMENT,
        f"[request id: r-1] the request's shared memory is with worker 'cuda:{TWIN_FACTS.uuid}', "
        "the model 'on_cpu' runs on cpu",
    )


# Ends


def test_a_region_in_use_goes_with_the_last_request(
    server: RunningServer, cuda: CudaRegions, memory: DeviceMemory
) -> None:
    where = in_region("R", 4)
    x = Input(name="x", datatype="FP32", shape=[1], parameters=where)
    turns = Input(name="turns", datatype="INT64", shape=[])

    def beside_a_run(count: int) -> tuple[list[str], bool]:
        """What is listed, and whether its name is taken."""
        memory.write(ROW[1:2].tobytes())
        raw = (np.array(count, np.int64).tobytes(),)
        call = cuda.stub.ModelInfer.future(request_of("slow", x, turns, raw=raw, y=where))
        until(lambda: call.done() or is_running(server, "slow"))
        cuda.unregister("R")
        listed = list(cuda.status())
        is_taken = says_taken(lambda: cuda.register("R", memory.handle, MIB))
        again = request_of("plus_one", row("a", parameters=in_region("R", 16)))
        assert not is_taken or refusal(lambda: cuda.stub.ModelInfer(again)) == (
            Status.NOT_FOUND,
            "Unable to find shared memory region: 'R'",
        )
        memory.write(bytes(4))
        assert list(call.result().raw_output_contents) == [b""]
        assert memory.read(4) == ROW[1:2].tobytes()
        return listed, is_taken

    found = beside_a_run(100_000)
    if found != (["R"], True):  # the run was over before, on a busy machine
        cuda.unregister()
        cuda.register("R", memory.handle, MIB)
        found = beside_a_run(1_000_000)
    assert found == (["R"], True)
    assert cuda.status() == {}


def is_running(server: RunningServer, model: str) -> bool:
    with server.channel() as channel:
        figures = metrics_pb2_grpc.MetricsStub(channel).Snapshot(metrics_pb2.SnapshotRequest())
    return any(each.running for each in figures.models if each.name == model)


def test_many_clients_register_use_and_unregister_at_once(
    server: RunningServer, cuda: CudaRegions
) -> None:
    def client(number: int) -> None:
        with server.channel() as channel, DeviceMemory(PAGE) as memory:
            calls = CudaRegions(channel)
            name = f"of {number}"
            memory.write((ROW * number).tobytes())
            for _ in range(10):
                calls.register(name, memory.handle, PAGE)
                a = row("a", parameters=in_region(name, 16))
                calls.stub.ModelInfer(request_of("plus_one", a, c=in_region(name, 16, 64)))
                assert memory.read(16, 64) == (ROW * number + 1).tobytes()
                calls.unregister(name)

    with ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(client, number) for number in range(6)]:
            each.result()


def test_a_worker_that_is_started_again_opens_what_is_still_there(
    server: RunningServer, cuda: CudaRegions, memory: DeviceMemory
) -> None:
    with DeviceMemory(PAGE) as other:
        cuda.register("gone", other.handle, PAGE)
        other.close_handle()
        before = worker_of(server)
        os.kill(before.pid, signal.SIGKILL)
        until(lambda: worker_of(server).restarts == before.restarts + 1)
        until(lambda: can_infer(cuda))
        memory.write(ROW.tobytes())
        request = request_of("plus_one", row("a", parameters=in_region("R", 16)))
        reply = cuda.stub.ModelInfer(request)
        assert list(reply.raw_output_contents) == [(ROW + 1).tobytes()]
        request = request_of("plus_one", row("a", parameters=in_region("gone", 16)))
        code, text = refusal(lambda: cuda.stub.ModelInfer(request))
        assert code is Status.INVALID_ARGUMENT
        assert "shared memory region 'gone' cannot be opened by the worker that was started" in text
        assert text.endswith("Register it again")


def can_infer(cuda: CudaRegions) -> bool:
    request = request_of("plus_one", row("a"), raw=(ROW.tobytes(),))
    try:
        cuda.stub.ModelInfer(request)
    except grpc.RpcError:
        return False
    return True
