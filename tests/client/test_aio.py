# SPDX-License-Identifier: Apache-2.0
"""The asyncio client: what differs from its blocking twin, and that they are twins."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.echo import EchoServer
from thirdrail import Client, Device, Stream, Unreachable, errors
from thirdrail.aio import AsyncClient, AsyncDevice
from thirdrail.aio_stream import AsyncStream

X = {"x": np.array([[1, 2]], np.float32)}

Body = Callable[[AsyncClient, EchoServer], Awaitable[None]]


def with_client(body: Body) -> Callable[[EchoServer], None]:
    """A test that runs in an event loop, with a client."""

    def test(echo: EchoServer) -> None:
        async def run() -> None:
            async with AsyncClient(echo.url) as client:
                await body(client, echo)

        asyncio.run(run())

    return test


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def own_methods(cls: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [(Client, AsyncClient), (Stream, AsyncStream), (Device, AsyncDevice)],
)
def test_twins_match_method_by_method(blocking: type, awaited: type) -> None:
    ours, theirs = own_methods(blocking), own_methods(awaited)
    assert list(ours) == list(theirs)
    for name in ("__init__", *ours):
        mine = dict(inspect.signature(getattr(blocking, name)).parameters)
        if blocking is Client and name == "__init__":
            del mine["busy_poll_us"]  # how a coroutine waits is its loop's business
        other = inspect.signature(getattr(awaited, name)).parameters
        assert list(mine) == list(other), name
        for parameter in mine:
            one, two = mine[parameter], other[parameter]
            assert (one.kind, one.default) == (two.kind, two.default), (name, parameter)
            if parameter not in ("self", "inference", "write", "client"):
                assert one.annotation == two.annotation, (name, parameter)


@with_client
async def test_infer_models_health(client: AsyncClient, echo: EchoServer) -> None:
    result = await client.infer("echo", [[1, 2]], request_id="r")
    np.testing.assert_array_equal(result["x"], X["x"], strict=True)
    assert [status.name for status in await client.models()] == ["echo"]
    assert (await client.describe("echo")).inputs[0].name == "x"
    seen: list[str] = []
    assert await client.load("echo", progress=lambda at: seen.append(at.phase)) == [1, 3]
    assert seen == ["reading", "ready"]
    described = echo.described
    await client.infer("echo", [[1, 2]])
    assert echo.described == described + 1  # after a load a model is asked anew
    assert await client.metrics() == "thirdrail_up 1\n"
    assert (await client.snapshot()).uptime_ns == 1
    assert await client.health() is True
    await client.wait_ready(1)
    await client.unload("echo")
    assert await client.health() is False
    with pytest.raises(errors.TimedOut, match="not serving"):
        await client.wait_ready(0.1)


@with_client
async def test_failures(client: AsyncClient, echo: EchoServer) -> None:
    with pytest.raises(errors.QueueFull, match="it failed") as raised:
        await client.infer("fails", X, parameters={"reason": "REASON_QUEUE_FULL"})
    assert raised.value.__notes__
    with pytest.raises(errors.TimedOut, match=r"within 0\.05 s"):
        await client.infer("held", X, timeout=0.05)


def test_nobody_there(tmp_path: Path) -> None:
    async def call() -> None:
        async with AsyncClient(f"unix:{tmp_path}/nobody.sock") as client:
            await client.infer("echo", X)

    with pytest.raises(Unreachable, match="no server answers at unix:"):
        asyncio.run(call())


@with_client
async def test_tasks_and_cancelling_them(client: AsyncClient, echo: EchoServer) -> None:
    done = await asyncio.gather(*(client.submit("echo", {"x": np.full(1, n)}) for n in range(20)))
    assert [result["x"][0] for result in done] == list(range(20))
    task = client.submit("held", X, request_id="gone")
    await until(lambda: len(echo.requests) == 21)
    task.cancel()
    await until(lambda: echo.cancelled == ["gone"])


@with_client
async def test_watching_ends_when_the_caller_stops(client: AsyncClient, echo: EchoServer) -> None:
    changes = client.watch()
    assert [(await anext(changes)).initial for _ in range(2)] == [True, False]
    await changes.aclose()  # type: ignore[attr-defined]
    await until(lambda: echo.cancelled == ["watch"])


@with_client
async def test_closing(client: AsyncClient, echo: EchoServer) -> None:
    assert repr(client) == f"<AsyncClient {echo.url} not connected>"
    await client.health()
    assert repr(client) == f"<AsyncClient {echo.url} open>"
    await client.close()
    assert repr(client) == f"<AsyncClient {echo.url} closed>"
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        await client.health()


def test_one_client_in_two_loops_one_after_the_other(echo: EchoServer) -> None:
    client = AsyncClient(echo.url)

    async def call() -> list[float]:
        found = (await client.infer("echo", X))["x"].ravel().tolist()
        assert isinstance(found, list)
        return found

    assert asyncio.run(call()) == asyncio.run(call()) == [1, 2]
    asyncio.run(client.close())


# -- streams -----------------------------------------------------------------------------------


@with_client
async def test_every_answer_finds_its_request(client: AsyncClient, echo: EchoServer) -> None:
    async with client.stream(in_flight_max=8) as stream:
        tasks = [stream.submit("echo", {"x": np.full(2, n)}) for n in range(200)]
        assert [(await task)["x"][0] for task in tasks] == list(range(200))
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        stream.submit("echo", X)


@with_client
async def test_bounds_and_cancelling_on_a_stream(client: AsyncClient, echo: EchoServer) -> None:
    async with client.stream(in_flight_max=2) as stream:
        tasks = [stream.submit("held", X, request_id=str(n)) for n in range(4)]
        await until(lambda: echo.in_flight_most == 2)
        await asyncio.sleep(0.05)
        assert repr(stream).endswith("open, 2 in flight>")
        tasks[0].cancel()
        await until(lambda: echo.cancelled == ["0"])
        echo.release.set()
        await stream.submit("echo", X)
        assert [(await task).request_id for task in tasks[1:]] == ["1", "2", "3"]
    assert echo.in_flight_most == 2


@with_client
async def test_one_failure_and_a_broken_stream(client: AsyncClient, echo: EchoServer) -> None:
    async with client.stream() as stream:
        failed = stream.submit("fails", X, parameters={"reason": "REASON_NOT_FOUND"})
        held = stream.submit("held", X)
        with pytest.raises(errors.NotFound):
            await failed
        with pytest.raises(Unreachable, match="the stream broke"):
            await stream.submit("breaks", X)
        with pytest.raises(Unreachable):
            await held
        with pytest.raises(Unreachable, match="has ended, open another one"):
            stream.submit("echo", X)


@with_client
async def test_an_exception_inside_cancels_what_is_open(
    client: AsyncClient, echo: EchoServer
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def leave() -> None:
        async with client.stream() as stream:
            tasks.append(stream.submit("held", X))
            await until(lambda: echo.in_flight_most)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await leave()
    assert tasks[0].cancelled()


@with_client
async def test_leaving_waits_for_every_answer(client: AsyncClient, echo: EchoServer) -> None:
    async with client.stream() as stream:
        task = stream.submit("held", X)
        await until(lambda: echo.in_flight_most)
        echo.release.set()
    assert task.done()
