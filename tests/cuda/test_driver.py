# SPDX-License-Identifier: Apache-2.0
"""Our use of the driver's bindings: by their own words, and run against a driver for the purpose.

No GPU is needed and none is used. What a GPU does with it, tests/gpu asks.
"""

import ast
import ctypes
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thirdrail.device import cuda_runtime, virtual_memory
from thirdrail_engines.cuda import chunks, driver_events
from thirdrail_engines.cuda import driver as our_driver
from thirdrail_engines.cuda.errors import RELAUNCH, STICKY
from thirdrail_engines.cuda.sharing import How
from thirdrail_engines.plans import BuildError

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wall", f"-Wl,-soname,{library.name}"]
    source = HERE / "stub_driver.c"
    subprocess.run(["gcc", *options, "-o", library, source, "-ldl", "-lpthread"], check=True)
    return folder


def run_on_stub(folder: Path, *command: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, for which the stub is the driver."""
    variables = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "STUB_DEVICES": str(devices),
        "THIRDRAIL_TEST_DEVICE": "driver",
    }
    return subprocess.run(
        [sys.executable, *command],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE.parent.parent,
    )


# By the bindings' own words


def calls_of(source: str) -> dict[str, set[int]]:
    """The functions of the driver that a source calls, and with how many arguments."""
    found: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and re.match("cu[A-Z]", name := str(first.value)):
            found.setdefault(name, set()).add(len(node.args) - 1)
        elif isinstance(node.func, ast.Attribute) and node.func.attr.startswith("cu"):
            found.setdefault(node.func.attr, set()).add(len(node.args))
    return found


@pytest.mark.needs_cuda_bindings
def test_every_function_exists_and_takes_what_we_pass() -> None:
    from cuda.bindings import driver

    ours = (our_driver, chunks, driver_events, virtual_memory, cuda_runtime)
    calls = calls_of("".join(map(inspect.getsource, ours)))
    assert len(calls) > 50
    for name, counts in calls.items():
        parameters = inspect.signature(getattr(driver, name)).parameters
        assert counts == {len(parameters)}, name


@pytest.mark.needs_cuda_bindings
def test_every_constant_exists() -> None:
    from cuda.bindings import driver

    source = inspect.getsource(our_driver)
    members = {
        name: owner
        for owner in ("CUevent_flags", "CUstream_flags", "CUstreamCaptureMode")
        for name in dir(getattr(driver, owner))
    }
    members |= dict.fromkeys(dir(driver.CUmemAllocationHandleType), "CUmemAllocationHandleType")
    members |= dict.fromkeys(dir(driver.CUresult), "CUresult")
    for name in set(re.findall(r"\bCU(?:DA)?_[A-Z_]{4,}\b", source)):
        assert name.startswith("CU_DEVICE_ATTRIBUTE_") or name in members or hasattr(driver, name)
    for name in re.findall(r'(?:has|_attribute)\((?:api, handle, )?"([A-Z_]+)"\)', source):
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), name


@pytest.mark.needs_cuda_bindings
def test_sticky_are_all_codes_after_which_a_process_must_be_relaunched() -> None:
    from cuda.bindings import driver

    documented = {
        code.name
        for code in driver.CUresult
        if "must be terminated and relaunched" in " ".join((code.__doc__ or "").split())
    }
    assert documented == RELAUNCH
    assert {code.name for code in driver.CUresult} >= STICKY


# Run against a driver for the purpose


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_the_device_contract_holds_on_the_bindings(stub_folder: Path) -> None:
    done = run_on_stub(
        stub_folder,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{HERE}/test_device_contract.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


TWO_DEVICES = (
    "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f",
    "MIG-10111213-1415-1617-1819-1a1b1c1d1e1f",
)
NO_EVENTS = "; ".join(
    f"not {how}: the device has no events that two processes share, and without them no order"
    for how in list(How)[:3]
)

FACTS = """
from thirdrail_engines.cuda.driver import list_devices, open_device
for facts in list_devices():
    print(facts.uuid, facts.is_mig, facts.capability_name, facts.driver, facts.name)
print(open_device("MIG-1011").facts.name)
print(open_device("GPU-0001").capabilities)
from thirdrail_engines.cuda.sharing_here import sharing_here
for uuid, sharing in sharing_here()[0].items():
    print(f"{uuid}: {sharing}")
"""


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_devices_are_told_by_uuid(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", FACTS, devices=2)
    assert done.stdout.splitlines() == [
        "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f False sm89 (13, 2) Stub 1",
        "MIG-10111213-1415-1617-1819-1a1b1c1d1e1f True sm89 (13, 2) Stub 2 MIG 1g.5gb",
        "Stub 2 MIG 1g.5gb",
        "Capabilities(has_virtual_memory=True, has_posix_fds=True, has_fabric_handles=False, "
        "has_memory_pools=False, has_pool_posix_fds=True, has_ipc_events=False, "
        "can_register_host=False, can_register_host_read_only=False, has_host_pools=False, "
        "is_integrated=False)",
        *(f"{device}: host memory; {NO_EVENTS}" for device in TWO_DEVICES),
    ], done.stderr


ERRORS = """
import ctypes
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.cuda.errors import CudaError, DeviceFault, OutOfDeviceMemory
stub = ctypes.CDLL("libcuda.so.1")
device = open_device()
stream, event = device.new_stream(), device.new_event()

def told(call, *arguments):
    try:
        print(call(*arguments))
    except (CudaError, DeviceFault) as error:
        print(type(error).__name__, error.code, "|", error)

stub.stub_not_ready(2)
told(event.is_done), told(event.is_done), told(event.is_done)
stub.stub_fail_next(b"cuStreamSynchronize", 400)
told(stream.synchronize), told(stream.synchronize)
told(device.allocate, 1 << 40)
told(stream.copy_in, 5, 5, 5)
stub.stub_fail_next(b"cuEventSynchronize", 700)
told(event.wait), told(device.check), told(event.is_done), told(device.allocate, 1)
"""


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_codes_become_errors_and_some_stay(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", ERRORS)
    lost = "DeviceFault CUDA_ERROR_ILLEGAL_ADDRESS | the device was lost: {}: illegal address"
    assert [line.partition(" (")[0] for line in done.stdout.splitlines()] == [
        "False",
        "False",
        "True",
        "CudaError CUDA_ERROR_INVALID_HANDLE | cuStreamSynchronize: invalid handle",
        "None",
        "OutOfDeviceMemory CUDA_ERROR_OUT_OF_MEMORY | cuMemAlloc: out of memory",
        "CudaError CUDA_ERROR_INVALID_VALUE | cuMemcpyHtoDAsync: invalid value",
        lost.format("cuEventSynchronize"),
        lost.format("cuMemGetInfo"),
        lost.format("cuEventQuery"),
        lost.format("cuMemAlloc"),
    ], done.stderr


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


MISSING = """
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.plans import BuildError
try:
    open_device()
except BuildError as error:
    print(error.fault.value, "|", error)
"""


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


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_a_driver_without_a_device_is_said_to_have_none(stub_folder: Path) -> None:
    done = run_on_stub(stub_folder, "-c", MISSING, devices=0)
    assert done.stdout.startswith("missing | no CUDA device: cuInit: no device"), done.stderr


@pytest.mark.needs_cuda_bindings
@pytest.mark.needs_gcc
def test_a_driver_that_fails_at_once_has_no_device(stub_folder: Path) -> None:
    fail = "import ctypes; ctypes.CDLL('libcuda.so.1').stub_fail_next(b'cuDeviceGetCount', 999)\n"
    done = run_on_stub(stub_folder, "-c", fail + MISSING)
    assert done.stdout.startswith("missing | no CUDA device: the device was lost: "), done.stderr


@pytest.mark.needs_cuda_bindings
def test_no_driver_is_an_error_that_says_so() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(BuildError, match=r"no CUDA device: .*libcuda\.so\.1"):
            our_driver.open_device()


def test_no_bindings_is_an_error_with_the_line_that_installs_them() -> None:
    code = "import sys; sys.modules['cuda'] = None\n" + MISSING
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "missing | cuda-bindings is not installed. Run: pip install 'thirdrail[cuda]'\n"
    ), done.stderr
