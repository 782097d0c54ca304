# SPDX-License-Identifier: Apache-2.0
"""Memory and events of two processes on the driver's bindings, run against a driver made for the
purpose."""

from pathlib import Path

import pytest

from cuda.stub_driver import run_on_stub, stub_folder

__all__ = ["stub_folder"]

CHUNKS = """
import ctypes, os, socket, subprocess, sys
import numpy as np
from thirdrail_engines.cuda.chunks import SharedChunk
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.cuda.errors import CudaError, OutOfDeviceMemory

def value(device, chunk, offset):
    got, stream = np.zeros(4, np.uint8), device.new_stream()
    stream.copy_out(got.ctypes.data, chunk.address + offset, 4)
    stream.synchronize()
    stream.close()
    return got.tolist()

def fill(device, chunk, offset, number):
    stream = device.new_stream()
    stream.fill(chunk.address + offset, 4, number)
    stream.synchronize()
    stream.close()

device = open_device()
if len(sys.argv) > 1:  # the client
    sock = socket.socket(fileno=int(sys.argv[1]))
    _, fds, _, _ = socket.recv_fds(sock, 1, 4)
    chunk = SharedChunk.open(device, fds[0], 4 << 20)
    os.close(fds[0])
    print("client sees", value(device, chunk, 0), value(device, chunk, 100))
    fill(device, chunk, 3 << 20, 9)
    sock.send(b"d")
    sock.recv(1)  # the server has closed its own
    print("client still sees", value(device, chunk, 0))
    chunk.close()
else:
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, sys.argv[0], str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    chunk = SharedChunk.create(device, 3_000_000)
    print(chunk.nbytes, value(device, chunk, 100), flush=True)
    fill(device, chunk, 0, 7)
    fd = chunk.export()
    socket.send_fds(ours, [b"x"], [fd])
    os.close(fd)
    ours.recv(1)
    print("server sees", value(device, chunk, 3 << 20), flush=True)
    chunk.close()
    ours.send(b"x")
    child.wait()
    before = os.listdir("/proc/self/fd")
    for call in (b"cuMemCreate", b"cuMemAddressReserve", b"cuMemMap", b"cuMemSetAccess",
                 b"cuMemsetD8Async"):
        ctypes.CDLL("libcuda.so.1").stub_fail_next(call, 1)
        try:
            SharedChunk.create(device, 1)
        except CudaError as error:
            print(error)
    print(os.listdir("/proc/self/fd") == before, ctypes.CDLL("libcuda.so.1").stub_pieces())
    pipe, _ = os.pipe()
    for fd, nbytes in ((pipe, 2 << 20), (999, 2 << 20)):
        try:
            SharedChunk.open(device, fd, nbytes)
        except CudaError as error:
            print(error)
    try:
        SharedChunk.create(device, 1 << 40)
    except OutOfDeviceMemory as error:
        print(error)
"""


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_two_processes_map_one_allocation(stub_folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "chunks.py"
    program.write_text(CHUNKS)
    done = run_on_stub(stub_folder, str(program))
    assert [line.partition(" (")[0] for line in done.stdout.splitlines()] == [
        f"{4 << 20} [0, 0, 0, 0]",
        "client sees [7, 7, 7, 7] [0, 0, 0, 0]",
        "server sees [9, 9, 9, 9]",
        "client still sees [7, 7, 7, 7]",
        "cuMemCreate: invalid value",
        "cuMemAddressReserve: invalid value",
        "cuMemMap: invalid value",
        "cuMemSetAccess: invalid value",
        "cuMemsetD8Async: invalid value",
        "True 0",
        "cuMemImportFromShareableHandle: invalid value",
        "cuMemImportFromShareableHandle: invalid value",
        "cuMemCreate: out of memory",
    ], done.stderr


CLIENT_END = """
import ctypes, os
import numpy as np
from thirdrail.device.arrays import Block, DeviceArray
from thirdrail.device.cuda_runtime import CudaRuntime
from thirdrail.errors import ThirdrailError
from thirdrail.v1.lane_pb2 import DEVICE_KIND_CUDA, DeviceAttached
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_engines.cuda.driver import open_device

stub = ctypes.CDLL("libcuda.so.1")
device = open_device()
memory, events = device.share_memory(1), device.share_events(2)
attached = DeviceAttached(
    uuid=device.facts.uuid, kind=DEVICE_KIND_CUDA, places=2, event_handles=events.handles
)
client = CudaRuntime(attached, [])
chunk = client.open_memory(memory.export(), memory.nbytes)
array = DeviceArray(Block(None, client, chunk.address, 0, ArenaRef()), 256, (2, 3), np.dtype("f4"))
array.copy_from(np.arange(6, dtype=np.float32).reshape(2, 3))
print(array.numpy().tolist(), array.__dlpack_device__())
interface = array.__cuda_array_interface__
print(interface["data"][0] - chunk.address, interface["shape"], interface["stream"])
seen, stream = np.zeros(6, np.float32), device.new_stream()
stream.copy_out(seen.ctypes.data, memory.address + 256, 24)  # the server's mapping of the same
print(seen.tolist())
client.record_in_ready(1, 0)
client.record_in_ready(2, stream.handle)
client.record_in_ready(2, stream.handle)
client.record_consumed(1, stream.handle)
stream.record(events.out_done[1])
client.wait_for_out_done(2, 0)
client.join(0, stream.handle)
def records(of): return [stub.stub_records(ctypes.c_void_p(each.handle)) for each in of]
print(records(events.in_ready), records(events.out_done), records(events.consumed))
print(array.__dlpack__(stream=1) is not None)
for uuid in ("GPU-ffffffff", attached.uuid):
    try:
        CudaRuntime(DeviceAttached(uuid=uuid, places=1), [])
    except ThirdrailError as error:
        print(str(error).partition(";")[0])
pipe, _ = os.pipe()
stub.stub_fail_next(b"cuMemSetAccess", 1)
for fd in (pipe, memory.export()):
    try:
        client.open_memory(fd, memory.nbytes)
    except ThirdrailError as error:
        print(error)
chunk.close()
client.close()
events.close()
memory.close()
stream.close()
print(stub.stub_pieces())
"""


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_a_clients_end_of_shared_memory_and_events(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", CLIENT_END)
    assert done.stdout.splitlines() == [
        "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] (2, 0)",
        "256 (2, 3) 1",
        "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]",
        "[1, 2] [0, 1] [1, 0]",
        "True",
        "the server's device GPU-ffffffff is none of the 1 that this process sees",
        "1 places have 3 events each of 64 bytes, got 0",
        "cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_VALUE",
        "cuMemSetAccess: CUDA_ERROR_INVALID_VALUE",
        "0",
    ], done.stderr


PEER = """
import ctypes
import numpy as np
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.cuda.errors import CudaError

stub = ctypes.CDLL("libcuda.so.1")
device = open_device()
address = device.allocate(4096)
native = device.call("cuIpcGetMemHandle", address)
handle = ctypes.string_at(native.getPtr(), 64)
memory, again = device.open_peer(handle), device.open_peer(handle)
print(memory.address == address, memory.nbytes, stub.stub_opened())
got, stream = np.zeros(4, np.uint8), device.new_stream()
stream.fill(address, 4, 7)
stream.copy_out(got.ctypes.data, memory.address, 4)
stream.synchronize()
print(got.tolist())
for wrong in (bytes(64), handle[:-1] + bytes(1)):
    try:
        device.open_peer(wrong)
    except CudaError as error:
        print(error)
stub.stub_fail_next(b"cuMemGetAddressRange_v2", 1)
try:
    device.open_peer(handle)
except CudaError as error:
    print(error)
memory.close()
again.close()
print(stub.stub_opened())
"""


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_another_process_s_memory_is_opened_by_all_64_bytes_of_its_handle(
    stub_folder: Path,
) -> None:
    done = run_on_stub(stub_folder, "-c", PEER)
    assert [line.partition(" (")[0] for line in done.stdout.splitlines()] == [
        "True 4096 2",
        "[7, 7, 7, 7]",
        "cuIpcOpenMemHandle: invalid handle",
        "cuIpcOpenMemHandle: invalid handle",
        "cuMemGetAddressRange: invalid value",
        "0",
    ], done.stderr
