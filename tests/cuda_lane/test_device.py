# SPDX-License-Identifier: Apache-2.0
"""A client's tensors on a device, through a real server whose device is a twin."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import thirdrail
from cuda_lane.conftest import UUID
from server.test_lives import until
from support.server import RunningServer
from thirdrail.dtypes import BY_NAME
from thirdrail.errors import FailedPrecondition, TimedOut
from thirdrail.lane import device_chunks
from thirdrail.v1 import inference_pb2, lane_pb2

X = np.arange(8, dtype=np.float32)
LARGE = np.arange(1 << 16, dtype=np.float32)


@pytest.fixture
def client(server: RunningServer) -> Iterator[thirdrail.Client]:
    with thirdrail.Client(f"unix:{server.socket}") as client:
        yield client


@pytest.fixture
def device(client: thirdrail.Client) -> thirdrail.Device:
    return thirdrail.Device(client)


def test_tensors_stay_on_the_device(device: thirdrail.Device) -> None:
    assert device.uuid == UUID
    x = device.empty(8)
    x.copy_from(X)
    with device.infer("twin_double", {"x": x}) as first:
        y = first["y"]
        assert isinstance(y, thirdrail.DeviceArray)
        assert (y.shape, str(y.dtype), y.nbytes) == ((8,), "float32", 32)
        second = device.infer("host_double", {"x": y})
        assert second["y"].numpy().tolist() == (4 * X).tolist()
        assert y.numpy().tolist() == (2 * X).tolist()
    with pytest.raises(thirdrail.CallerError, match="was released"):
        y.numpy()
    with pytest.raises(thirdrail.CallerError, match="was released"):
        device.infer("twin_double", {"x": y})


def test_host_and_device_in_one_request(device: thirdrail.Device) -> None:
    a, b = np.ones((2, 4), np.float32), np.full((2, 4), 2, np.float32)
    mixed = device.infer("host_add", {"a": device.array(a), "b": b})
    assert mixed["c"].numpy().tolist() == (a + b).tolist()
    large = np.arange(40_000, dtype=np.float32).reshape(-1, 4)  # by reference
    both = device.infer("host_add", {"a": large, "b": device.array(large)}, on_host=["c"])
    assert type(both["c"]) is np.ndarray
    np.testing.assert_array_equal(both["c"], 2 * large)
    alone = device.infer("host_add", {"a": a, "b": [[1] * 4] * 2}, outputs=["c"])
    assert alone["c"].numpy().tolist() == (a + 1).tolist()


def test_places_and_memory_come_back_with_the_last_view(device: thirdrail.Device) -> None:
    x = device.array(X)
    for _ in range(200):  # there are 64 places
        last = np.from_dlpack(device.infer("host_double", {"x": x})["y"])
    assert last.tolist() == (2 * X).tolist()
    held = [device.infer("host_double", {"x": x}) for _ in range(63)]
    with pytest.raises(thirdrail.NotNow, match="hold all 64 places of this session"):
        device.infer("host_double", {"x": x})
    assert all(each["y"].numpy().tolist() == (2 * X).tolist() for each in held)
    held.pop().release()
    del last
    gc.collect()
    assert device.infer("host_double", {"x": x})["y"].numpy().tolist() == (2 * X).tolist()


def test_memory_is_used_again(device: thirdrail.Device, client: thirdrail.Client) -> None:
    for _ in range(50):
        device.empty(1 << 19)  # 2 MiB
    used = {each.address for each in (device.empty(1 << 18) for _ in range(4))}
    assert len(used) <= 2
    with pytest.raises(thirdrail.NotNow, match="more bytes of input memory on the device"):
        device.empty(1 << 30)
    with pytest.raises(thirdrail.CallerError, match="cannot lie on a device"):
        device.empty(1, "BYTES")


def test_errors_of_requests(device: thirdrail.Device) -> None:
    with pytest.raises(thirdrail.CallerError, match="unexpected shape for input 'x'"):
        device.infer("twin_double", {"x": device.empty((2, 2))})
    with pytest.raises(thirdrail.CallerError, match="data-type is 'INT32'"):
        device.infer("twin_double", {"x": device.empty(2, "INT32")})
    with pytest.raises(thirdrail.CallerError, match="'nowhere' is not found"):
        device.infer("nowhere", {"x": device.empty(2)})
    x = device.array(X)
    for _ in range(100):  # no place is lost by any of them
        with pytest.raises(thirdrail.CallerError):
            device.infer("twin_double", {"x": x}, outputs=["nothing"])
    assert device.infer("twin_double", {"x": x})["y"].numpy().tolist() == (2 * X).tolist()


def test_outputs_that_are_asked_for(device: thirdrail.Device) -> None:
    x = device.array(X)
    alone = device.infer("twin_double", x, on_host=["y"], parameters={"note": 1})
    assert alone["y"].tolist() == (2 * X).tolist()
    with pytest.raises(thirdrail.CallerError, match="on_host must be a sequence of names"):
        device.infer("twin_double", x, on_host="yes")  # which has a y in it
    with pytest.raises(thirdrail.CallerError, match="outputs must be a sequence of names"):
        device.infer("twin_double", x, outputs="y")
    with pytest.raises(thirdrail.CallerError, match=r"on_host has 'z', expected some of .*: y"):
        device.infer("twin_double", x, on_host=["z"])


def test_what_this_process_lacks_is_said_each_time(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker gives its device once in a session, also in vain."""

    def lacks(attached: Any, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        raise FailedPrecondition("memory on a device needs a package")

    monkeypatch.setattr(device_chunks, "open_runtime", lacks)
    with thirdrail.Client(f"unix:{server.socket}") as client:
        for _ in range(2):
            with pytest.raises(thirdrail.CallerError, match="needs a package"):
                thirdrail.Device(client)


@pytest.mark.parametrize("name", [name for name, row in BY_NAME.items() if row.name != "BYTES"])
def test_other_libraries_show_every_type(device: thirdrail.Device, name: str) -> None:
    array = device.empty((2, 3), name)
    assert array.__dlpack_device__() == (1, 0)
    assert not hasattr(array, "__cuda_array_interface__")
    array.copy_from(np.ones((2, 3), array.dtype))
    assert array.numpy().tolist() == [[1] * 3] * 2
    if name != "BF16":  # numpy has no name for it
        seen = np.from_dlpack(array)
        assert (seen.shape, seen.dtype, seen.tolist()) == ((2, 3), array.dtype, [[1] * 3] * 2)
    with pytest.raises(BufferError):
        array.__dlpack__(copy=True)


@pytest.mark.needs_torch
def test_torch_reads_and_writes_in_place(device: thirdrail.Device) -> None:
    import torch

    x = device.array(X)
    shown = torch.from_dlpack(x)
    shown += 1
    result = torch.from_dlpack(device.infer("twin_double", {"x": x})["y"])
    assert result.tolist() == (2 * (X + 1)).tolist()
    half = torch.from_dlpack(device.empty((2, 2), "BF16"))
    assert half.dtype == torch.bfloat16
    del x, shown
    gc.collect()
    assert result.tolist() == (2 * (X + 1)).tolist()


def test_a_client_without_the_device(server: RunningServer, client: thirdrail.Client) -> None:
    assert thirdrail.Device(client, UUID[:20]).uuid == UUID
    with (
        thirdrail.Client(f"unix:{server.socket}") as another,
        pytest.raises(thirdrail.CallerError, match=f"computes on {UUID} .*, not on 'GPU-ff'"),
    ):
        thirdrail.Device(another, "GPU-ff")
    with pytest.raises(thirdrail.CallerError, match=f"computes on {UUID}, not on 'GPU-ff'"):
        thirdrail.Device(client, "GPU-ff")
    with (
        thirdrail.Client(f"unix:{server.socket}", transport="grpc") as remote,
        pytest.raises(thirdrail.CallerError, match="lane"),
    ):
        thirdrail.Device(remote)


def test_arrays_belong_to_one_session(server: RunningServer, device: thirdrail.Device) -> None:
    x = device.array(X)
    with (
        thirdrail.Client(f"unix:{server.socket}") as another,
        pytest.raises(thirdrail.CallerError, match="an array of another session"),
    ):
        thirdrail.Device(another).infer("twin_double", {"x": x})
    assert x.numpy().tolist() == X.tolist()


def test_arrays_stay_readable_after_the_session(server: RunningServer) -> None:
    with thirdrail.Client(f"unix:{server.socket}") as client:
        device = thirdrail.Device(client)
        result = device.infer("twin_double", {"x": device.array(X)})
    assert result["y"].numpy().tolist() == (2 * X).tolist()
    with pytest.raises(thirdrail.ThirdrailError):
        device.infer("twin_double", {"x": X})


def test_a_closed_client_gives_its_memory_back(server: RunningServer) -> None:
    """At once, and not when the garbage collector comes by. Of the host and of the device."""
    gc.collect()
    before = lane_memory()
    gc.disable()
    try:
        with thirdrail.Client(f"unix:{server.socket}") as client:
            device = thirdrail.Device(client)
            x = device.array(LARGE)
            with device.infer("host_double", {"x": x}) as result:
                assert result["y"].numpy()[1] == 2
            assert device.infer("host_double", {"x": LARGE}, on_host=["y"])["y"][1] == 2
            assert lane_memory() - before
        del client, device, x, result
        assert not lane_memory() - before
    finally:
        gc.enable()


def lane_memory() -> set[str]:
    """The lane's memory that this process has mapped, by the files' numbers (proc(5))."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:thirdrail" in line}


def test_threads_share_a_device(device: thirdrail.Device) -> None:
    def use(number: int) -> list[float]:
        x = device.array(np.full(4, number, np.float32))
        for _ in range(3):
            x = device.infer("twin_double" if number % 2 else "host_double", {"x": x})["y"]
        values: list[float] = x.numpy().tolist()
        return values

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(40))) == [[8 * number] * 4 for number in range(40)]


def test_debug_mode_looks_at_inputs_on_the_host(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thirdrail.Client(f"unix:{server.socket}", debug=True) as client:
        device = thirdrail.Device(client)
        x = client.empty((10_000,))
        x[:] = 1
        lane = client._connected().access.lane()
        assert lane is not None
        send_call = lane.talk.send_call

        def write_meanwhile(*arguments: Any) -> None:
            x[0] = 2
            send_call(*arguments)

        monkeypatch.setattr(lane.talk, "send_call", write_meanwhile)
        with pytest.raises(thirdrail.CallerError, match="input 'x' was written while"):
            device.infer("twin_double", {"x": x})
        monkeypatch.undo()
        session = lane.device("")
        session.collect()
        memory = session.memory
        assert memory.places_free == memory.place_count, "its place came back"
        assert device.infer("twin_double", {"x": x})["y"].numpy()[0] == 4


def test_what_a_stuck_worker_does_not_take_back_holds_up_no_request(server: RunningServer) -> None:
    with thirdrail.Client(f"unix:{server.socket}") as client:
        device = thirdrail.Device(client)
        result = device.infer("host_double", {"x": X})
        lane = client._connected().access.lane()
        assert lane is not None
        workers = psutil.Process(server.pid).children()
        for worker in workers:
            worker.suspend()
        try:
            message = lane_pb2.LaneRequest(cancel=inference_pb2.Cancel(call=1 << 40))
            with contextlib.suppress(TimedOut):
                while True:
                    lane.talk.send(message, 0.0)
            result.release()
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(device.infer, "host_double", {"x": X}, timeout=0.1)
                wait([asked], 20)  # or it would wait for the worker, and this test for it
                for worker in workers:
                    worker.resume()
                assert isinstance(asked.exception(), TimedOut)
        finally:
            for worker in workers:
                worker.resume()
        device.infer("host_double", {"x": X}).release()
        session = device._session
        session.collect()
        assert session.memory.places_free == session.memory.place_count


def has_ended(device: thirdrail.Device) -> bool:
    try:
        device.infer("twin_double", {"x": X})
    except thirdrail.NotNow:
        return True
    return False


def test_the_server_dies(
    server: RunningServer, client: thirdrail.Client, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped stays, who waits for the device is told, and another device is to be had from
    the next worker."""
    device = thirdrail.Device(client)
    x = device.array(X)
    result = device.infer("twin_double", {"x": x})
    first = client.snapshot().workers[0].pid
    runtime, is_answered = device._session.memory.runtime, threading.Event()
    wait_for_out_done = runtime.wait_for_out_done

    def note(*arguments: int) -> Any:
        is_answered.set()
        return wait_for_out_done(*arguments)

    monkeypatch.setattr(runtime, "wait_for_out_done", note)
    gate.touch()
    with ThreadPoolExecutor(1) as pool:
        undone = pool.submit(device.infer, "twin_double", {"x": x})
        assert is_answered.wait(30)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(thirdrail.NotNow):
            undone.result(30)
    gate.unlink()
    until(lambda: has_ended(device))
    assert result["y"].numpy().tolist() == (2 * X).tolist()
    until(lambda: client.snapshot().workers[0].pid != first and client.health("twin_double"))
    again = thirdrail.Device(client).infer("twin_double", {"x": result["y"].numpy()})
    assert again["y"].numpy().tolist() == (4 * X).tolist()
