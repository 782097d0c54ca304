# SPDX-License-Identifier: Apache-2.0
"""AsyncClient on the lane of a real server: attached by itself, again after a worker's death, and
why not elsewhere."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import errors
from thirdrail.aio import AsyncClient
from thirdrail.dtypes import BYTES, DTYPES
from thirdrail.transport import ATTACH_AGAIN_SOON_S, NOTHING_YET, Transport
from thirdrail.v1 import sessions_pb2
from thirdrail.v1.sessions_pb2_grpc import SessionsStub
from thirdrail_server.config import WorkerConfig

StartServer = Callable[..., RunningServer]

LARGE = np.arange(1 << 20, dtype=np.float32)  # 4 MiB
SLOW = {"x": np.ones(1, np.float32), "turns": np.array(120_000)}  # 0.6 s or more
FOR_EVER = SLOW | {"turns": np.array(2_000_000_000)}
OTHER_UID = "54321"


def lane_of(server: RunningServer) -> Path:
    return server.socket.with_name("grpc.cpu.lane")


def sessions_of(server: RunningServer) -> list[sessions_pb2.SessionInfo]:
    """Those of clients of this process."""
    with server.channel() as channel:
        listed = SessionsStub(channel).ListSessions(sessions_pb2.ListSessionsRequest())
    return [s for s in listed.sessions if s.pid == os.getpid() and not s.is_front]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def echoed(client: AsyncClient, array: Any, **options: Any) -> Any:
    return (await client.infer("identity_fp32", {"x": array}, **options))["y"]


async def test_a_client_attaches_by_itself(server: RunningServer) -> None:
    await until(lambda: not sessions_of(server))
    async with AsyncClient(server.url) as client:
        assert client.transport == NOTHING_YET
        await client.health()
        assert client.transport.name == "grpc-unix"
        await asyncio.gather(*(echoed(client, LARGE) for _ in range(10)))
        assert client.transport == Transport("lane", str(lane_of(server)), "")
        [session] = sessions_of(server)
        assert session.calls == 10
        assert session.client_name
    await until(lambda: not sessions_of(server))


async def test_by_tcp_as_well(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        await echoed(client, LARGE)
        assert client.transport == Transport("lane", str(lane_of(server)), "")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda row: row.name)
async def test_every_type_there_and_back(server: RunningServer, dtype: Any) -> None:
    few: Any = np.array([0, 1, 1], dtype=object if dtype is BYTES else dtype.numpy)
    if dtype is BYTES:
        few[:] = [b"", b"a\0b", "ä".encode() * 1000]
    many = np.tile(few, 20_000)
    async with AsyncClient(server.url, transport="lane") as client:
        for sent in (few, many, few.tolist(), many[::-1], few[:0]):
            found = (await client.infer(f"identity_{dtype.name.lower()}", {"x": sent}))["y"]
            assert found.dtype == few.dtype
            assert found.tolist() == np.asarray(sent, few.dtype).tolist()
            assert not found.flags.writeable


# A run that was interrupted is followed by one on a thread, and whatever comes meanwhile waits.
QUEUE_REQUESTS_MAX = WorkerConfig().queue_requests_max


async def test_thousands_of_calls_at_once(server: RunningServer) -> None:
    numbers = [np.full(3, n, np.float32) for n in range(QUEUE_REQUESTS_MAX)]
    async with AsyncClient(server.url, transport="lane") as client:
        for _ in range(6):
            found = await asyncio.gather(*(echoed(client, number) for number in numbers))
            assert all((a == b).all() for a, b in zip(found, numbers, strict=True))


async def test_options_and_failures_are_those_of_grpc(server: RunningServer) -> None:
    scores = {"x": np.array([[0.1, 0.7, 0.2]], np.float32)}
    found: list[Any] = []
    for transport in ("lane", "grpc"):
        async with AsyncClient(server.url, transport=transport) as client:
            result = await client.infer(
                "classifier", scores, classes=1, request_id="r", version=1, priority=1, timeout=9
            )
            failures: list[Any] = []
            for model, inputs, timeout in (
                ("nowhere", {"x": LARGE}, 9),
                ("identity_fp32", {"x": [1, 2], "z": LARGE}, 9),
                ("identity_fp32", {"x": LARGE}, -1),
                ("add", {"a": LARGE}, 9),
            ):
                with pytest.raises(errors.CallerError) as raised:
                    await client.infer(model, inputs, timeout=timeout)
                failures.append((type(raised.value), str(raised.value)))
            with pytest.raises(errors.TimedOut):
                await client.infer("slow", SLOW, timeout=0.01)
            described = (result["scores"].tolist(), result.request_id, result.model_version)
            found.append((described, failures))
    assert found[0] == found[1]


async def test_arrays_to_fill_in_and_borrowed_results(server: RunningServer) -> None:
    await until(lambda: not sessions_of(server))
    async with AsyncClient(server.url) as client:
        array = await client.empty((2, 1 << 19))
        array[:] = LARGE.reshape(array.shape)
        async with asyncio.timeout(30):
            result = await client.infer("identity_fp32", {"x": array.reshape(-1)}, borrow=True)
        with result:
            assert result.is_borrowed
            again = await client.infer("identity_fp32", {"x": result["y"]}, borrow=True)
            [session] = sessions_of(server)
            assert session.leases == 2
            assert (again["y"] == LARGE).all()
        del again
        await until(lambda: sessions_of(server)[0].leases == 0)


async def test_the_same_over_grpc(server: RunningServer) -> None:
    async with AsyncClient(server.url, transport="grpc") as client:
        array = await client.empty(4, np.int32, shared=True)
        assert array.shape == (4,)
        assert array.dtype == np.int32
        result = await client.infer("identity_fp32", {"x": LARGE}, borrow=True)
        assert not result.is_borrowed
        assert client.transport.reason == "the client was made with transport='grpc'"
        await until(lambda: not sessions_of(server))  # but for those of earlier tests


async def test_only_the_whole_of_a_shared_array_is_handed_over_where_it_lies(
    server: RunningServer,
) -> None:
    async with AsyncClient(server.url, transport="lane") as client:
        array = await client.empty(50, shared=True)
        array[:] = 1
        assert (await client.export(array[:25])).copies == 1
        assert array.flags.writeable
        assert (await client.export(array)).copies == 0
        assert not array.flags.writeable


async def test_streams(server: RunningServer) -> None:
    async with AsyncClient(server.url, transport="lane") as client:
        async with client.stream(in_flight_max=8) as stream:
            assert repr(stream) == "<AsyncStream on the lane open, 0 in flight>"
            tasks = [stream.submit("identity_fp32", {"x": np.full(2, n, "f4")}) for n in range(99)]
            failing = stream.submit("nowhere", {"x": LARGE})
        assert [(await task)["y"][0] for task in tasks] == list(range(99))
        assert isinstance(failing.exception(), errors.NotFound)
        with pytest.raises(errors.FailedPrecondition, match="closed"):
            stream.submit("identity_fp32", {"x": LARGE})

        tasks.clear()

        async def leave() -> None:
            async with client.stream() as stream:
                tasks.append(stream.submit("slow", SLOW))
                raise KeyError

        with pytest.raises(KeyError):
            await leave()
        assert tasks[0].cancelled()


async def test_a_cancelled_task_cancels_the_request(server: RunningServer) -> None:
    await until(lambda: not sessions_of(server))
    async with AsyncClient(server.url, transport="lane") as client:
        running, waiting = client.submit("slow", SLOW), client.submit("slow", SLOW)
        await until(lambda: sessions_of(server) and sessions_of(server)[0].calls_in_flight == 2)
        waiting.cancel()
        await until(lambda: sessions_of(server)[0].calls_in_flight < 2)
        assert (await running)["y"].tolist() == [1.0]
        with pytest.raises(asyncio.CancelledError):
            await waiting


def test_one_client_in_two_loops_one_after_the_other(server: RunningServer) -> None:
    client = AsyncClient(server.url, transport="lane")

    async def call() -> None:
        assert (await echoed(client, LARGE) == LARGE).all()
        await until(lambda: len(sessions_of(server)) == 1)

    asyncio.run(call())
    asyncio.run(call())
    asyncio.run(client.close())


async def test_calls_in_flight_when_it_is_closed(server: RunningServer) -> None:
    await until(lambda: not sessions_of(server))
    client = AsyncClient(server.url, transport="lane")
    task = client.submit("slow", SLOW)
    await until(lambda: sessions_of(server))
    await client.close()
    with pytest.raises(errors.Cancelled):
        await task


async def test_closed_at_any_moment(server: RunningServer) -> None:
    """Also while it connects and attaches: the call ends as one of ours, and no session is left."""
    for turn in range(40):
        client = AsyncClient(server.url, transport="lane")
        await client.health()
        call = client.submit("slow", SLOW)
        for _ in range(turn):
            await asyncio.sleep(0)
        await asyncio.sleep(turn % 8 / 2000)
        await client.close()
        with pytest.raises(errors.Cancelled):
            await call
    await until(lambda: not sessions_of(server))


@pytest.mark.slow
async def test_a_worker_that_is_killed(
    start_server: StartServer, standard_repository: Path
) -> None:
    server = start_server(standard_repository)
    async with AsyncClient(server.url) as client, AsyncClient(server.url) as other:
        kept = await client.infer("identity_fp32", {"x": LARGE}, borrow=True)
        running = [client.submit("slow", FOR_EVER) for _ in range(5)]
        stream = other.stream()
        await stream.__aenter__()
        streamed = stream.submit("slow", FOR_EVER)
        await until(lambda: sum(s.calls_in_flight for s in sessions_of(server)) == 6)
        os.kill(server.worker_pid(), signal.SIGKILL)
        for task in (*running, streamed):
            with pytest.raises(errors.Unavailable, match="the worker is gone"):
                await task
        assert (kept["y"] == LARGE).all()  # the memory is there as long as somebody shows it
        ended = client.transport
        assert ended.name == "grpc-unix"
        assert "the next call attaches anew" in ended.reason
        await until(lambda: stream.submit("slow", SLOW).cancel())
        await stream.__aexit__(None, None, None)

        # The server may take a moment to see the death, and another to load the models again.
        while True:
            with contextlib.suppress(errors.Unavailable):
                assert (await echoed(client, kept["y"]) == LARGE).all()
                if client.transport.name == "lane":
                    break
            await asyncio.sleep(ATTACH_AGAIN_SOON_S)
        kept.release()  # of a session that is no more


@pytest.mark.slow
async def test_a_server_that_comes_back(
    start_server: StartServer, standard_repository: Path
) -> None:
    server = start_server(standard_repository)
    async with AsyncClient(server.url) as client:
        await echoed(client, LARGE)
        server.stop()
        with pytest.raises(errors.Unavailable):
            await echoed(client, LARGE)


# -- why not -----------------------------------------------------------------------------------


async def fallback(server: RunningServer, url: str, caplog: Any) -> Transport:
    """What a client uses there; `transport="lane"` must fail for the same reason."""
    caplog.set_level(logging.INFO, "thirdrail")
    caplog.clear()
    async with AsyncClient(url) as client:
        for _ in range(3):
            assert (await echoed(client, LARGE) == LARGE).all()
        found = client.transport
    told = [each.getMessage() for each in caplog.records if each.name == "thirdrail"]
    assert told == [f"calls go over gRPC, not over the lane: {found.reason}"]
    async with AsyncClient(url, transport="lane") as client:
        with pytest.raises(errors.FailedPrecondition) as raised:
            await echoed(client, LARGE)
    assert str(raised.value) == f"cannot use the lane: {found.reason}"
    return found


@pytest.mark.slow
async def test_a_server_with_tcp_alone(
    start_server: StartServer, standard_repository: Path, caplog: Any
) -> None:
    server = start_server(standard_repository, "--no-socket", wait=False)
    async with AsyncClient(server.address) as client:
        await client.wait_ready(60)
    found = await fallback(server, server.address, caplog)
    assert (found.name, found.address) == ("grpc-tcp", server.address)
    assert "no Unix socket" in found.reason


async def test_a_server_without_a_lane(
    start_server: StartServer, standard_repository: Path, caplog: Any
) -> None:
    server = start_server(standard_repository, "--no-lane")
    found = await fallback(server, server.url, caplog)
    assert (found.name, found.address) == ("grpc-unix", server.url)
    assert "--no-lane" in found.reason


async def test_a_uid_that_is_not_allowed(
    start_server: StartServer, standard_repository: Path, caplog: Any
) -> None:
    server = start_server(standard_repository, f"--lane-uid={OTHER_UID}")
    found = await fallback(server, server.url, caplog)
    assert found.name == "grpc-unix"
    assert f"uid {os.getuid()}" in found.reason


async def test_a_socket_that_is_gone(
    start_server: StartServer, standard_repository: Path, caplog: Any
) -> None:
    server = start_server(standard_repository)
    lane_of(server).unlink()
    found = await fallback(server, server.address, caplog)
    assert found.name == "grpc-tcp"
    assert f"the lane's socket is not at '{lane_of(server)}'" in found.reason
    assert "another host" in found.reason
