# SPDX-License-Identifier: Apache-2.0
"""An asyncio client's tensors on a device, through a real server whose device is a twin."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thirdrail
from cuda_lane.conftest import UUID
from support.server import RunningServer
from thirdrail.aio import AsyncClient, AsyncDevice
from thirdrail.errors import FailedPrecondition
from thirdrail.lane import device_chunks
from thirdrail.lane.device_memory import DeviceMemory

X = np.arange(8, dtype=np.float32)
WAIT_S_MAX = 30


@asynccontextmanager
async def device_of(
    server: RunningServer, **options: Any
) -> AsyncIterator[tuple[AsyncClient, AsyncDevice]]:
    async with AsyncClient(f"unix:{server.socket}", **options) as client:
        yield client, await AsyncDevice(client)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S_MAX):
        while not condition():
            await asyncio.sleep(0.002)


def memory_of(device: AsyncDevice) -> DeviceMemory:
    return device._session.memory


def has_all_places(device: AsyncDevice) -> bool:
    """Without asking for anything: what goes back does so by itself."""
    return memory_of(device).places_free == memory_of(device).place_count


async def test_tensors_stay_on_the_device(server: RunningServer) -> None:
    async with device_of(server) as (_, device):
        assert device.uuid == UUID
        x = await device.empty(8)
        x.copy_from(X)
        with await device.infer("twin_double", {"x": x}) as first:
            y = first["y"]
            assert isinstance(y, thirdrail.DeviceArray)
            assert (y.shape, str(y.dtype), y.nbytes) == ((8,), "float32", 32)
            second = await device.infer("host_double", {"x": y})
            assert second["y"].numpy().tolist() == (4 * X).tolist()
            assert (await asyncio.to_thread(y.numpy)).tolist() == (2 * X).tolist()
        with pytest.raises(thirdrail.CallerError, match="was released"):
            y.numpy()
        with pytest.raises(thirdrail.CallerError, match="was released"):
            await device.infer("twin_double", {"x": y})


async def test_host_and_device_in_one_request(server: RunningServer) -> None:
    async with device_of(server) as (client, device):
        a, b = np.ones((2, 4), np.float32), np.full((2, 4), 2, np.float32)
        mixed = await device.infer("host_add", {"a": await device.array(a), "b": b})
        assert mixed["c"].numpy().tolist() == (a + b).tolist()
        # By reference, and more than is copied on the loop.
        large = np.arange(400_000, dtype=np.float32).reshape(-1, 4)
        there, host = await device.array(large), await client.empty(large.shape)
        host[:] = 1
        both = await device.infer("host_add", {"a": host, "b": there}, on_host=["c"])
        assert type(both["c"]) is np.ndarray
        np.testing.assert_array_equal(both["c"], large + 1)
        alone = await device.infer("host_add", {"a": a, "b": [[1] * 4] * 2}, outputs=["c"])
        assert alone["c"].numpy().tolist() == (a + 1).tolist()
        only = await device.infer("twin_double", await device.array(X), parameters={"note": 1})
        assert only["y"].numpy().tolist() == (2 * X).tolist()


async def test_places_and_memory_come_back_with_the_last_view(server: RunningServer) -> None:
    async with device_of(server) as (_, device):
        x = await device.array(X)
        held = [await device.infer("host_double", {"x": x}) for _ in range(64)]
        with pytest.raises(thirdrail.NotNow, match="hold all 64 places of this session"):
            await device.infer("host_double", {"x": x})
        assert all(each["y"].numpy().tolist() == (2 * X).tolist() for each in held)
        await asyncio.to_thread(held.pop().release)
        last = np.from_dlpack((await device.infer("host_double", {"x": x}))["y"])
        del held
        gc.collect()
        await until(lambda: memory_of(device).places_free == 63)
        assert last.tolist() == (2 * X).tolist()
        del last
        gc.collect()
        await until(lambda: has_all_places(device))


async def test_memory_is_used_again(server: RunningServer) -> None:
    async with device_of(server) as (client, device):
        for _ in range(50):
            await device.empty(1 << 19)  # 2 MiB
        at_once = await asyncio.gather(*(device.empty(1 << 18) for _ in range(4)))
        assert len({each.address for each in at_once}) == 4
        addresses = {each.address for each in at_once}
        del at_once
        gc.collect()
        again = [await device.empty(1 << 18) for _ in range(4)]
        assert {each.address for each in again} == addresses
        with pytest.raises(thirdrail.CallerError, match="cannot lie on a device"):
            await device.empty(1, "BYTES")
        # What is refused to one is not refused to another that waits for its turn.
        refused, given = await asyncio.gather(
            device.empty(1 << 30), client.empty(1 << 20), return_exceptions=True
        )
        assert "more bytes of input memory on the device" in str(refused)
        assert isinstance(refused, thirdrail.NotNow)
        assert isinstance(given, np.ndarray)


async def test_errors_of_requests(server: RunningServer) -> None:
    async with device_of(server) as (_, device):
        x = await device.array(X)
        wrong: list[tuple[str, Any, dict[str, Any], str]] = [
            ("twin_double", await device.empty((2, 2)), {}, "unexpected shape for input 'x'"),
            ("twin_double", await device.empty(2, "INT32"), {}, "data-type is 'INT32'"),
            ("nowhere", x, {}, "'nowhere' is not found"),
            ("twin_double", x, {"on_host": "yes"}, "on_host must be a sequence of names"),
            ("twin_double", x, {"on_host": ["z"]}, "on_host has 'z'"),
            ("twin_double", x, {"outputs": "y"}, "outputs must be a sequence of names"),
            ("twin_double", x, {"timeout": -1}, "timeout must be above 0"),
        ]
        for model, value, options, text in wrong:
            with pytest.raises(thirdrail.CallerError, match=text):
                await device.infer(model, {"x": value}, **options)
        for _ in range(100):  # no place is lost by any of them
            with pytest.raises(thirdrail.CallerError):
                await device.infer("twin_double", {"x": x}, outputs=["nothing"])
        result = await device.infer("twin_double", {"x": x})
        assert result["y"].numpy().tolist() == (2 * X).tolist()


async def test_a_client_without_the_device(server: RunningServer) -> None:
    url = f"unix:{server.socket}"
    async with AsyncClient(url) as client, AsyncClient(url, transport="grpc") as remote:
        with pytest.raises(thirdrail.CallerError, match=f"computes on {UUID} .*, not on 'GPU-ff'"):
            await AsyncDevice(client, "GPU-ff")
        with pytest.raises(thirdrail.CallerError, match="device = await AsyncDevice"):
            await AsyncDevice(client).empty(1)
        assert (await AsyncDevice(client, UUID[:20])).uuid == UUID  # one may ask again
        assert (await AsyncDevice(client, "cuda")).uuid == UUID
        with pytest.raises(thirdrail.CallerError, match=f"computes on {UUID}, not on 'GPU-ff'"):
            await AsyncDevice(client, "GPU-ff")
        with pytest.raises(thirdrail.CallerError, match="lane"):
            await AsyncDevice(remote)


async def test_a_device_is_asked_for_once(server: RunningServer) -> None:
    """By many at once, of whom some give up."""
    async with AsyncClient(f"unix:{server.socket}") as client:
        session = await client._connected().access.session()
        assert session is not None
        first = asyncio.ensure_future(_await(AsyncDevice(client)))
        await until(lambda: first.done() or session.device.opening._question)
        first.cancel()
        await client.infer("host_double", {"x": X})  # by now the answer has come, to nobody
        found = await asyncio.gather(*(_await(AsyncDevice(client)) for _ in range(3)))
        assert len({id(memory_of(each)) for each in found}) == 1


async def _await(device: AsyncDevice) -> AsyncDevice:
    return await device


async def test_who_asks_no_more_hears_of_no_refusal(server: RunningServer) -> None:
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    async with AsyncClient(f"unix:{server.socket}") as client:
        session = await client._connected().access.session()
        assert session is not None
        asking = asyncio.ensure_future(session.device.opening.attach("another"))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        with pytest.raises(thirdrail.CallerError):  # in its turn, when the other has been answered
            await session.device.opening.attach("another")
        del asking
        gc.collect()
    assert not unheard


async def test_what_this_process_lacks_is_said_each_time(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker gives its device once in a session, also in vain."""

    def lacks(attached: Any, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        raise FailedPrecondition("memory on a device needs a package")

    monkeypatch.setattr(device_chunks, "open_runtime", lacks)
    async with AsyncClient(f"unix:{server.socket}") as client:
        for _ in range(2):
            with pytest.raises(thirdrail.CallerError, match="needs a package"):
                await AsyncDevice(client)


async def test_arrays_belong_to_one_session(server: RunningServer) -> None:
    async with device_of(server) as (_, device), device_of(server) as (_, another):
        x = await device.array(X)
        with pytest.raises(thirdrail.CallerError, match="an array of another session"):
            await another.infer("twin_double", {"x": x})
        assert has_all_places(another)
        assert x.numpy().tolist() == X.tolist()


async def test_arrays_stay_readable_after_the_session(server: RunningServer) -> None:
    async with device_of(server) as (_, device):
        result = await device.infer("twin_double", {"x": await device.array(X)})
    assert result["y"].numpy().tolist() == (2 * X).tolist()
    for refused in (device.infer("twin_double", {"x": X}), device.empty(1), _await(device)):
        with pytest.raises(thirdrail.ThirdrailError, match=r"client (was|is) closed"):
            await refused
    result.release()


def test_the_example_of_the_docs(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/cuda.md").read_text()
    _, _, example = page.partition("<!-- run on a twin by tests/cuda_lane -->\n```python\n")
    code = example.partition("```")[0].replace('"double"', '"twin_double"')
    monkeypatch.setenv("THIRDRAIL_URL", f"unix:{server.socket}")
    exec(compile(code, "docs/cuda.md", "exec"), {})
    assert capsys.readouterr().out == "[ 4.  8. 12.]\n"


async def test_coroutines_share_a_device(server: RunningServer) -> None:
    async with device_of(server) as (_, device):

        async def use(number: int) -> list[float]:
            x = await device.array(np.full(4, number, np.float32))
            for _ in range(3):
                model = "twin_double" if number % 2 else "host_double"
                x = (await device.infer(model, {"x": x}))["y"]
            values: list[float] = x.numpy().tolist()
            return values

        values = await asyncio.gather(*map(use, range(30)))
        assert values == [[8 * number] * 4 for number in range(30)]
