# SPDX-License-Identifier: Apache-2.0
"""The device contract on a GPU, and a sticky error that is real. Not yet run on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thirdrail_engines.cuda.driver import DriverDevice

TESTS = Path(__file__).parent.parent

ILLEGAL = """
import sys
from support import wild_kernel
from thirdrail_engines.cuda.driver import open_device
from thirdrail_engines.cuda.errors import DeviceFault

device = open_device(sys.argv[1])
stream, event = device.new_stream(), device.new_event()
wild_kernel.launch(device, stream)
stream.record(event)
for call in (event.wait, device.check, lambda: device.allocate(1), event.is_done):
    try:
        call()
        print("nothing")
    except DeviceFault as error:
        print(error.code)
"""


def test_the_contract(device: DriverDevice) -> None:
    """The suite that the twin passes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(TESTS / "cuda/test_device_contract.py")],
        env=os.environ | {"THIRDRAIL_TEST_DEVICE": "driver"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def test_a_wild_kernel_is_a_sticky_error_in_every_later_call(device: DriverDevice) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ILLEGAL, device.facts.uuid],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["CUDA_ERROR_ILLEGAL_ADDRESS"] * 4, done.stderr
    device.check()  # other processes go on


def test_facts_are_plausible(device: DriverDevice) -> None:
    facts, memory = device.facts, device.memory()
    assert facts.uuid.startswith(("GPU-", "MIG-"))
    assert facts.compute_capability >= (5, 0)
    assert 0 < memory.free_bytes <= memory.total_bytes
    print(facts, device.capabilities)


@pytest.mark.parametrize("megabytes", [1, 64])
def test_pinned_copies_are_faster_than_pageable_ones(device: DriverDevice, megabytes: int) -> None:
    """Figures for docs/cuda.md (run with -s)."""
    import time

    import numpy as np

    nbytes = megabytes << 20
    stream, address = device.new_stream(), device.allocate(nbytes)
    pinned, pageable = device.allocate_pinned(nbytes), np.zeros(nbytes, np.uint8)
    pinned.view[:] = 1
    best = {}
    for name, source in (("pinned", pinned.address), ("pageable", pageable.ctypes.data)):
        times = []
        for _ in range(10):
            started = time.perf_counter()
            stream.copy_in(address, source, nbytes)
            stream.synchronize()
            times.append(time.perf_counter() - started)
        best[name] = nbytes / min(times) / 1e9
    print(f"{megabytes} MiB: {best} GB/s")
    assert best["pinned"] > best["pageable"]
    device.free_pinned(pinned)
    device.free(address)
    stream.close()
