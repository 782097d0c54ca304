# SPDX-License-Identifier: Apache-2.0
"""Errors keep nothing of those who got them: a cycle with our frames would keep arrays of theirs,
and shared memory, until the garbage collector comes by.
"""

import asyncio
import gc
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import Client, errors
from thirdrail.aio import AsyncClient
from thirdrail.lane.aio import AsyncLane
from thirdrail.v1 import inference_pb2, lane_pb2

X = {"x": np.ones(4, np.float32)}
WRONG = {"x": np.ones(4, np.float64)}
NO_TOKEN = "tr1_" + "A" * 22


class Array:
    """What a caller has in a variable."""


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, transport="lane") as client:
        assert client.infer("identity_fp32", X)
        yield client


def in_stream(client: Client) -> object:
    with client.stream() as stream:
        return stream.submit("identity_fp32", WRONG).result()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.infer("identity_fp32", WRONG),
        lambda client: client.infer("identity_fp32", WRONG, borrow=True),
        lambda client: client.infer("nowhere", X),
        lambda client: client.submit("identity_fp32", WRONG).result(),
        lambda client: client.submit("nowhere", X).result(),
        in_stream,
        lambda client: client.receive(NO_TOKEN),
    ],
)
def test_a_failed_call_keeps_nothing(client: Client, call: Callable[[Client], object]) -> None:
    def fail() -> "weakref.ref[Array]":
        array = Array()
        with pytest.raises(errors.CallerError):
            call(client)
        return weakref.ref(array)

    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.infer("identity_fp32", WRONG),
        lambda client: client.infer("identity_fp32", WRONG, borrow=True),
        lambda client: client.infer("nowhere", X),
        lambda client: client.receive(NO_TOKEN),
    ],
)
async def test_a_failed_asyncio_call_keeps_nothing(
    server: RunningServer, call: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    async with AsyncClient(server.url, transport="lane") as client:

        async def fail() -> "weakref.ref[Array]":
            array = Array()
            with pytest.raises(errors.CallerError):
                await call(client)
            return weakref.ref(array)

        await fail()  # the first call attaches
        gc.collect()
        gc.disable()
        try:
            kept = await fail()
            await asyncio.sleep(0)
            assert kept() is None
        finally:
            gc.enable()


async def test_what_the_front_asks_of_a_worker_that_dies_is_not_kept() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    attaching = asyncio.ensure_future(AsyncLane.attach(ours))
    await asyncio.to_thread(theirs.recv, 1 << 16)
    limits = lane_pb2.Limits(packet_bytes=1 << 16, calls_in_flight=1)
    attached = lane_pb2.LaneResponse(attached=lane_pb2.Attached(version=1, limits=limits))
    theirs.send(attached.SerializeToString())
    lane = await attaching

    async def fail() -> "weakref.ref[Array]":
        array = Array()
        asyncio.get_running_loop().call_soon(theirs.close)
        with pytest.raises(errors.Unavailable):
            await lane.call(inference_pb2.InferRequest(model_name="m"))
        return weakref.ref(array)

    gc.collect()
    gc.disable()
    try:
        kept = await fail()
        await asyncio.sleep(0)
        assert kept() is None
    finally:
        gc.enable()
