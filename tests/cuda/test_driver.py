# SPDX-License-Identifier: Apache-2.0
"""Devices on the driver's bindings, run against a driver made for the purpose."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from cuda.stub_driver import HERE, run_on_stub, stub_folder
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.cuda.sharing import How
from thirdrail_engines.plans import BuildError

__all__ = ["stub_folder"]


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


MISSING = """
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.plans import BuildError
try:
    open_device()
except BuildError as error:
    print(error.fault.value, "|", error)
"""


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
            open_device()


def test_no_bindings_is_an_error_with_the_line_that_installs_them() -> None:
    code = "import sys; sys.modules['cuda'] = None\n" + MISSING
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "missing | cuda-bindings is not installed. Run: pip install 'thirdrail[cuda]'\n"
    ), done.stderr
