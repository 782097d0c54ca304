# SPDX-License-Identifier: Apache-2.0
"""Closing a client at any moment: whatever it does then ends with an error of ours, and it keeps
nothing open."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.echo import EchoServer
from support.server import RunningServer
from thirdrail import Client, Result, client, errors
from thirdrail.aio import AsyncClient
from thirdrail.lane import attach
from thirdrail.transport import TransportChoice

X = {"x": np.ones(4, np.float32)}
LARGE = {"x": np.ones(1 << 16, np.float32)}


def in_stream(client: Client) -> object:
    with client.stream() as stream:
        return stream.submit("echo", X).result()


async def in_async_stream(client: AsyncClient) -> object:
    async with client.stream() as stream:
        return await stream.submit("echo", X)


async def first_change(client: AsyncClient) -> object:
    async for change in client.watch():
        return change
    return None


CALLS: list[Callable[[Client], object]] = [
    lambda client: client.infer("echo", X),
    lambda client: client.submit("echo", X),
    in_stream,
    lambda client: client.models(),
    lambda client: client.health(),
    lambda client: client.load("echo"),
    lambda client: next(client.watch()),
]
AWAITED_CALLS: list[Callable[[AsyncClient], Awaitable[object]]] = [
    lambda client: client.infer("echo", X),
    in_async_stream,
    lambda client: client.models(),
    lambda client: client.health(),
    lambda client: client.load("echo"),
    first_change,
]


def test_calls_under_way_are_told_that_the_client_was_closed(
    client: Client, echo: EchoServer
) -> None:
    with client.stream() as stream, ThreadPoolExecutor(1) as pool:
        calls = [
            pool.submit(client.infer, "held", X),
            client.submit("held", X),
            stream.submit("held", X),
        ]
        while not echo.in_flight_most or len(echo.requests) < 2:  # on a stream; by themselves
            time.sleep(0.005)
        client.close()
        for each in calls:
            error = each.exception(60)
            assert isinstance(error, errors.Cancelled)
            assert str(error) == "the client was closed"


@pytest.mark.parametrize("transport", ["grpc", "lane"])
def test_a_call_that_begins_while_another_thread_closes(
    echo: EchoServer, monkeypatch: pytest.MonkeyPatch, transport: TransportChoice
) -> None:
    """It has the connection already, and the channel is closed when it gets there."""
    client = Client(echo.url, transport=transport)
    connection = client._connected()
    client.close()
    monkeypatch.setattr(client, "_connected", lambda: connection)
    for call in CALLS:
        with pytest.raises(errors.Cancelled, match="the client was closed"):
            call(client)


async def test_a_call_that_begins_while_another_task_closes(
    echo: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = AsyncClient(echo.url, transport="grpc")
    connection = client._connected()
    await client.close()
    monkeypatch.setattr(client, "_connected", lambda: connection)
    for call in AWAITED_CALLS:
        with pytest.raises(errors.Cancelled, match="the client was closed"):
            await call(client)


async def test_calls_that_wait_for_the_first_one_to_attach(echo: EchoServer) -> None:
    client = AsyncClient(echo.url)
    calls = [asyncio.create_task(client.infer("held", X)) for _ in range(3)]
    await asyncio.sleep(0)
    await client.close()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, errors.Cancelled)


def test_closing_while_the_server_is_looked_for(
    echo: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Client(echo.url)

    def close_meanwhile(*_: Any, **__: Any) -> str:
        found.close()
        return echo.url

    monkeypatch.setattr(client, "find_address", close_meanwhile)
    with pytest.raises(errors.FailedPrecondition, match="this client is closed"):
        found.infer("echo", X)


def test_closing_while_a_lane_is_attached(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker would count a session that nobody ends until this process ends."""
    client = Client(server.url, transport="lane")
    connection, connect = client._connected(), attach.connect

    def close_meanwhile(*arguments: Any) -> Any:
        client.close()
        return connect(*arguments)

    monkeypatch.setattr(attach, "connect", close_meanwhile)
    with pytest.raises(errors.Cancelled, match="the client was closed"):
        client.infer("identity_fp32", X)
    assert connection.lanes.transport.name == "grpc-unix"


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_borrowed_result_outlives_its_loop(server: RunningServer, is_closed: bool) -> None:
    client = AsyncClient(server.url, transport="lane")

    async def borrow() -> Result:
        result = await client.infer("identity_fp32", LARGE, borrow=True)
        if is_closed:
            await client.close()
        return result

    with asyncio.run(borrow()) as result:
        assert result.is_borrowed
        assert (result["y"] == 1).all()
    asyncio.run(client.close())


# Memory


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What forms a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def lane_memory() -> set[str]:
    """The lane's memory that this process has mapped, by the files' numbers (proc(5))."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:thirdrail" in line}


def share(client: Client) -> str:
    shared = client.empty(LARGE["x"].shape, np.float32, shared=True)
    shared[:] = 1
    return client.export(shared).token


def receive(client: Client) -> None:
    assert client.receive(share(client)).array[-1] == 1


def keep(client: Client) -> Any:
    return client.empty(LARGE["x"].shape)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.infer("identity_fp32", LARGE)["y"].sum(),
        lambda client: client.infer("identity_fp32", LARGE, borrow=True)["y"].sum(),
        lambda client: client.submit("identity_fp32", LARGE).result()["y"].sum(),
        lambda client: client.submit("identity_fp32", LARGE).add_done_callback(lambda _: None),
        lambda client: keep(client).sum(),
        share,
        receive,
    ],
)
def test_a_closed_client_gives_its_memory_back(
    server: RunningServer, use: Callable[[Client], object]
) -> None:
    """At once, and not when the garbage collector comes by: it may be a gigabyte."""
    before = lane_memory()
    with Client(server.url, transport="lane") as client:
        use(client)
        assert lane_memory() - before
    del client
    wait_until(lambda: not lane_memory() - before)  # a watcher may be at its end


@pytest.mark.usefixtures("no_collector")
def test_a_closed_asyncio_client_gives_its_memory_back(server: RunningServer) -> None:
    before = lane_memory()

    async def use() -> None:
        async with AsyncClient(server.url, transport="lane") as client, client.stream() as stream:
            assert (await client.infer("identity_fp32", LARGE))["y"].all()
            with await client.infer("identity_fp32", LARGE, borrow=True) as result:
                assert result["y"].all()
            assert (await stream.submit("identity_fp32", LARGE))["y"].all()
            shared = await client.empty(LARGE["x"].shape, shared=True)
            shared[:] = 1
            received = await client.receive((await client.export(shared)).token)
            assert received.array.all()
            assert lane_memory() - before

    async def use_it_and_go_on() -> None:
        await use()
        async with asyncio.timeout(30):
            while lane_memory() - before:
                await asyncio.sleep(0.005)

    asyncio.run(use_it_and_go_on())


@pytest.mark.usefixtures("no_collector")
def test_memory_that_somebody_shows_goes_with_him(server: RunningServer) -> None:
    before = lane_memory()
    with Client(server.url, transport="lane") as client:
        array = keep(client)
    del client
    assert len(lane_memory() - before) == 1
    array[:] = 1
    del array
    assert not lane_memory() - before


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.005)
