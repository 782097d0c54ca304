# SPDX-License-Identifier: Apache-2.0
"""What every device does, whoever plays it: the twin, a GPU, or the driver's bindings on a driver
made for the purpose (THIRDRAIL_TEST_DEVICE=driver, see test_driver.py and tests/gpu).
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from support.copying import CopyProgram
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES, Device, PinnedMemory
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.cuda.errors import CudaError, OutOfDeviceMemory
from thirdrail_engines.cuda.twin import TwinDevice


@pytest.fixture
def device() -> Iterator[Device]:
    made: Device
    if os.environ.get("THIRDRAIL_TEST_DEVICE") == "driver":
        from thirdrail_engines.cuda.driver import open_device

        made = open_device(os.environ.get("THIRDRAIL_TEST_UUID", ""))
    else:
        made = TwinDevice()
    yield made
    made.close()


@pytest.fixture
def pinned(device: Device) -> Iterator[PinnedMemory]:
    memory = device.allocate_pinned(1 << 20)
    yield memory
    device.free_pinned(memory)


def test_bytes_go_in_across_and_out_in_order(device: Device, pinned: PinnedMemory) -> None:
    stream, event = device.new_stream(), device.new_event()
    one, two = device.allocate(1 << 16), device.allocate(1 << 16)
    sent = np.arange(1 << 16, dtype=np.uint32).astype(np.uint8)
    pinned.view[: 1 << 16] = sent
    stream.fill(two, 1 << 16, 9)
    stream.copy_in(one, pinned.address, 1 << 16)
    stream.copy(two + 256, one + 256, 1024)
    stream.copy_out(pinned.address + (1 << 16), two, 1 << 16)
    stream.record(event)
    event.wait()
    assert event.is_done()
    got = pinned.view[1 << 16 : 1 << 17]
    assert (got[256:1280] == sent[256:1280]).all()
    assert (np.delete(got, slice(256, 1280)) == 9).all()
    for address in (one, two):
        device.free(address)
    event.close()
    stream.close()


def test_pageable_memory_may_be_copied_as_well(device: Device) -> None:
    stream, address = device.new_stream(), device.allocate(4000)
    sent, got = np.arange(1000, dtype=np.int32), np.zeros(1000, np.int32)
    stream.copy_in(address, sent.ctypes.data, sent.nbytes)
    stream.copy_out(got.ctypes.data, address, got.nbytes)
    stream.synchronize()
    assert got.tolist() == sent.tolist()
    device.free(address)
    stream.close()


def test_an_event_joins_two_streams(device: Device, pinned: PinnedMemory) -> None:
    first, second, event = device.new_stream(), device.new_stream(), device.new_event()
    address = device.allocate(1 << 18)
    for value in range(20):
        first.fill(address, 1 << 18, value)
        first.record(event)
        second.wait(event)
        second.copy_out(pinned.address, address, 1 << 18)
        second.synchronize()
        assert (pinned.view[: 1 << 18] == value).all()
    device.free(address)
    for each in (event, first, second):
        each.close()


def test_an_event_that_was_never_recorded_is_done(device: Device) -> None:
    event, stream = device.new_event(), device.new_stream()
    assert event.is_done()
    event.wait()
    stream.wait(event)
    stream.synchronize()
    event.close()
    stream.close()


def test_a_graph_does_its_work_as_often_as_launched(device: Device, pinned: PinnedMemory) -> None:
    stream, address = device.new_stream(), device.allocate(1024)
    stream.begin_capture()
    stream.copy(address + 512, address, 512)
    graph = stream.end_capture()
    for value in (1, 2):
        stream.fill(address, 512, value)
        stream.launch(graph)
        stream.copy_out(pinned.address, address, 1024)
        stream.synchronize()
        assert (pinned.view[:1024] == value).all()
    graph.close()
    device.free(address)
    stream.close()


def test_memory_is_counted_aligned_and_bounded(device: Device) -> None:
    before = device.memory()
    size = 32 << 20
    address = device.allocate(size)
    assert address % ALIGNMENT_BYTES == 0
    assert device.memory().free_bytes <= before.free_bytes - size
    with pytest.raises(OutOfDeviceMemory, match="cuMemAlloc: out of memory"):
        device.allocate(before.total_bytes)
    device.free(address)
    assert device.memory().total_bytes == before.total_bytes == device.facts.memory_bytes


def test_a_mistake_is_an_error_and_the_device_goes_on(device: Device) -> None:
    for wrong in (lambda: device.allocate(0), lambda: device.free(0x1234)):
        with pytest.raises(CudaError, match="invalid value"):
            wrong()
    device.check()


def test_every_thread_may_use_it(device: Device) -> None:
    def work(number: int) -> None:
        stream, event, address = device.new_stream(), device.new_event(), device.allocate(4096)
        got = np.zeros(4096, np.uint8)
        stream.fill(address, 4096, number)
        stream.copy_out(got.ctypes.data, address, 4096)
        stream.record(event)
        event.wait()
        assert (got == number).all()
        device.free(address)
        event.close()
        stream.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(32)))


def test_handles_are_numbers_that_others_can_use(device: Device) -> None:
    stream, event = device.new_stream(), device.new_event()
    assert stream.handle > 0
    assert event.handle > 0
    event.close()
    stream.close()


@pytest.mark.parametrize("staging_bytes_max", [0, 8 << 20])
def test_the_engine_runs_on_it(device: Device, staging_bytes_max: int) -> None:
    options = CudaOptions(instances=2, graphs_max=4, staging_bytes_max=staging_bytes_max)
    engine = CudaEngine(CopyProgram(), device, "copy", options)

    def caller(number: int) -> None:
        random = np.random.default_rng(number)
        for count in (0, 1, 1000, 500_000) * 4:
            x = random.random(count, np.float32)
            into = {"y": np.empty_like(x)} if number % 2 else {}
            assert (engine.run({"x": x}, ["y"], into)["y"] == x).all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(caller, range(6)))
    assert sum(figures.launched for figures in engine.graph_figures) > 0
    assert sum(figures.refused for figures in engine.graph_figures) > 0  # the empty ones
    engine.close()


def test_waiting_lets_other_threads_run(device: Device) -> None:
    """Otherwise a device that takes long would stop the worker's loop."""
    slow_ms = _make_waits_slow(device)
    event, stream, ticks = device.new_event(), device.new_stream(), []
    stream.record(event)
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    event.wait()
    stop.set()
    thread.join()
    assert len(ticks) >= slow_ms / 10
    event.close()
    stream.close()
    _make_waits_slow(device, ms=0)


def _make_waits_slow(device: Device, ms: int = 100) -> int:
    """Only the driver that was made for the purpose can; others are not asked to."""
    import ctypes

    if isinstance(device, TwinDevice):
        return 0
    library = ctypes.CDLL("libcuda.so.1")
    if not hasattr(library, "stub_wait"):
        return 0
    library.stub_wait(ms)
    return ms
