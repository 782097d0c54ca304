# SPDX-License-Identifier: Apache-2.0
"""What an asyncio client does while a device, or the worker, takes its time, and when it dies."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thirdrail
from cuda_lane.test_aio_device import WAIT_S_MAX, X, device_of, has_all_places, memory_of, until
from support.server import RunningServer
from thirdrail.aio import AsyncClient, AsyncDevice
from thirdrail.device.twin_runtime import TwinRuntime
from thirdrail.errors import Internal
from thirdrail.lane.aio_room import Room
from thirdrail.lane.results import private_output


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The device computes nothing until the file is gone."""
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


def twin_of(device: AsyncDevice) -> TwinRuntime:
    runtime = memory_of(device).runtime
    assert isinstance(runtime, TwinRuntime)
    return runtime


async def test_the_loop_goes_on_while_the_device_computes(
    server: RunningServer, gate: Path
) -> None:
    async with device_of(server) as (client, device):
        x = await device.array(X)
        await device.infer("twin_double", {"x": x})
        gate.touch()
        try:
            calls = [asyncio.ensure_future(device.infer("twin_double", {"x": x})) for _ in "ab"]
            await until(lambda: memory_of(device).places_free == 62)
            for _ in range(20):
                assert (await client.infer("host_double", {"x": X}))["y"][1] == 2
            assert not any(call.done() for call in calls)
            calls[1].cancel()
        finally:
            gate.unlink()
        assert (await calls[0])["y"].numpy().tolist() == (2 * X).tolist()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        del calls
        gc.collect()
        await until(lambda: has_all_places(device))


async def test_the_loop_goes_on_while_memory_is_mapped(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(server) as (client, device):
        may_map, opened = threading.Event(), TwinRuntime.open_memory

        def open_slowly(self: TwinRuntime, fd: int, nbytes: int) -> Any:
            assert may_map.wait(WAIT_S_MAX)
            return opened(self, fd, nbytes)

        monkeypatch.setattr(TwinRuntime, "open_memory", open_slowly)
        made = asyncio.ensure_future(device.array(X))
        result = asyncio.ensure_future(device.infer("twin_double", {"x": X}))  # comes on a chunk
        given_up = asyncio.ensure_future(device.infer("twin_double", {"x": X}))
        opening = device._session.opening
        await until(lambda: opening._mapping is not None and not client_calls(client))
        for _ in range(20):
            assert (await client.infer("host_double", {"x": X}))["y"][1] == 2
        given_up.cancel()
        assert not made.done()
        assert not result.done()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        may_map.set()
        assert (await made).numpy().tolist() == X.tolist()
        assert (await result)["y"].numpy().tolist() == (2 * X).tolist()
        del result
        gc.collect()
        await until(lambda: has_all_places(device))


def client_calls(client: AsyncClient) -> int:
    return client._connected().access.calls_in_flight


async def test_memory_that_cannot_be_mapped_ends_the_session(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(server) as (client, device):

        def refuse(self: TwinRuntime, fd: int, nbytes: int) -> Any:
            os.close(fd)
            raise Internal("cuMemMap: CUDA_ERROR_OUT_OF_MEMORY")

        with monkeypatch.context() as patch:
            patch.setattr(TwinRuntime, "open_memory", refuse)
            with pytest.raises(thirdrail.NotNow, match="cannot be used: cuMemMap"):
                await device.empty(1)
        with pytest.raises(thirdrail.NotNow):
            await device.infer("twin_double", {"x": X})
        again = await AsyncDevice(client)
        assert (await again.infer("twin_double", {"x": X}))["y"].numpy()[1] == 2


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_a_request_that_is_given_up(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its inputs are never ready, so the worker holds it."""
    async with device_of(server) as (client, device):
        x, twin = await device.array(X), twin_of(device)
        with monkeypatch.context() as patch:
            patch.setattr(twin, "record_in_ready", lambda place, _: twin._ours.record(place - 1))
            timeout = 0.05 if how == "timed out" else None
            held = asyncio.ensure_future(device.infer("twin_double", {"x": x}, timeout=timeout))
            await until(lambda: held.done() or client_calls(client))
            if how == "cancelled":
                held.cancel()
            with pytest.raises((asyncio.CancelledError, thirdrail.NotNow)) as ended:
                await held
        assert isinstance(ended.value, asyncio.CancelledError) == (how == "cancelled")
        await until(lambda: has_all_places(device))
        assert (await device.infer("twin_double", {"x": x}))["y"].numpy()[1] == 2


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_a_request_that_is_given_up_before_it_is_sent(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It waits for room on the host."""
    async with device_of(server) as (_, device):
        large = {"x": np.ones(10_000, np.float32)}
        with monkeypatch.context() as patch:
            patch.setattr(Room, "refer", lambda *_: asyncio.Event().wait())
            timeout = 0.02 if how == "timed out" else None
            held = asyncio.ensure_future(device.infer("twin_double", large, timeout=timeout))
            await until(lambda: held.done() or memory_of(device).places_free == 63)
            if how == "cancelled":
                held.cancel()
            with pytest.raises((asyncio.CancelledError, thirdrail.NotNow)) as ended:
                await held
        if how == "timed out":
            assert "no answer within 0.02 s" in str(ended.value)
        assert has_all_places(device)
        assert (await device.infer("twin_double", large))["y"].numpy()[1] == 2


async def test_a_request_that_is_given_up_as_its_answer_comes(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(server) as (client, device):
        x = await device.array(X)
        session = await client._connected().access.session()
        assert session is not None
        answered, calls = session._on_response, list[asyncio.Future[Any]]()

        def and_cancel(response: Any) -> None:
            answered(response)
            calls[0].cancel()

        monkeypatch.setattr(session, "_on_response", and_cancel)
        calls.append(asyncio.ensure_future(device.infer("twin_double", {"x": x})))
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        await until(lambda: has_all_places(device))


async def test_a_request_that_is_given_up_as_its_result_is_read(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the loop, since some of it is large and on the host. The rest is on the device."""
    reading, may_end = threading.Event(), threading.Event()

    def read_slowly(*arguments: Any) -> Any:
        reading.set()
        may_end.wait(WAIT_S_MAX)
        return private_output(*arguments)

    monkeypatch.setattr("thirdrail.lane.device_memory.private_output", read_slowly)
    async with device_of(server) as (_, device):
        x = np.ones(300_000, np.float32)
        call = asyncio.ensure_future(device.infer("host_both", {"x": x}, on_host=["z"]))
        await until(reading.is_set)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        may_end.set()
        await until(lambda: has_all_places(device))


async def test_debug_mode_looks_at_inputs_on_the_host(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device_of(server, debug=True) as (client, device):
        x = await client.empty((10_000,))
        x[:] = 1
        session = await client._connected().access.session()
        assert session is not None
        begin = session._begin

        def write_meanwhile(*arguments: Any) -> int:
            x[0] = 2
            return begin(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(session, "_begin", write_meanwhile)
            with pytest.raises(thirdrail.CallerError, match="input 'x' was written while"):
                await device.infer("twin_double", {"x": x})
        await until(lambda: has_all_places(device))
        assert (await device.infer("twin_double", {"x": x}))["y"].numpy()[0] == 4


async def test_a_client_that_is_closed_with_work_under_way(
    server: RunningServer, closed: Path
) -> None:
    async with device_of(server) as (client, device):
        x = await device.array(X)
        held = asyncio.ensure_future(device.infer("twin_double", {"x": x}))
        await until(lambda: memory_of(device).places_free == 63 and not client_calls(client))
        await client.close()
        with pytest.raises(thirdrail.NotNow, match="the client was closed"):
            await held


async def test_memory_is_unmapped_beside_the_loop(server: RunningServer) -> None:
    """With the session and the last array over it; whatever it holds is waited for there."""
    async with device_of(server) as (_, device):
        result = await device.infer("twin_double", {"x": await device.array(X)})
        thread = device._session.opening._thread
    assert thread is not None
    del device
    gc.collect()
    assert result["y"].numpy().tolist() == (2 * X).tolist()
    assert thread.is_alive()
    del result
    # The loop may still have something of the session to let go of.
    await until(lambda: gc.collect() >= 0 and not thread.is_alive())


@pytest.mark.slow
async def test_the_server_dies(server: RunningServer, gate: Path) -> None:
    """What is mapped stays, who waits is told, and the next worker has a device as well."""
    async with device_of(server) as (client, device):
        x = await device.array(X)
        result = await device.infer("twin_double", {"x": x})
        first = (await client.snapshot()).workers[0].pid
        gate.touch()
        undone = asyncio.ensure_future(device.infer("twin_double", {"x": x}))
        await until(lambda: memory_of(device).places_free == 62 and not client_calls(client))
        os.kill(first, signal.SIGKILL)
        with pytest.raises(thirdrail.NotNow):
            async with asyncio.timeout(WAIT_S_MAX):
                await undone
        gate.unlink()
        with pytest.raises(thirdrail.NotNow):
            await device.infer("twin_double", {"x": X})
        assert result["y"].numpy().tolist() == (2 * X).tolist()
        async with asyncio.timeout(WAIT_S_MAX):
            while True:
                try:
                    again = await AsyncDevice(client)
                    values = await again.infer("twin_double", {"x": result["y"].numpy()})
                    break
                except thirdrail.ThirdrailError:
                    await asyncio.sleep(0.01)
        np.testing.assert_array_equal(values["y"].numpy(), 4 * X)
