# SPDX-License-Identifier: Apache-2.0
"""Clients that get as far as a test wants and wait there to be killed: `die_at` in a process."""

import asyncio
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from support.lane_peer import LanePeer, Request, by_ref, connect, hello, infer
from thirdrail import Client
from thirdrail.aio import AsyncClient
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import lane_pb2, sessions_pb2, tensor_pb2
from thirdrail.v1.sessions_pb2_grpc import SessionsStub

LARGE = np.arange(1 << 18, dtype=np.float32)  # 1 MiB
RUN_TURNS = 30_000  # of the model "slow": 0.2 to 1 s
LONG_RUN_TURNS = 120_000
UNREAD_CALLS = 1500  # the kernel's queue takes about 300
FORKED_S = 60

# What a step leaves for as long as its process lives, to be kept from the collector.
Kept = Any


def die_at(pipe: Connection, url: str, step: str) -> None:
    """Says the numbers of processes that it has forked, once the step is reached."""
    kept = STEPS[step](url)
    pipe.send(kept if isinstance(kept, int) else 0)
    pipe.poll(None)


def opened(url: str) -> sessions_pb2.OpenSessionResponse:
    channel = grpc.insecure_channel(url)  # open when the process is killed
    return SessionsStub(channel).OpenSession(sessions_pb2.OpenSessionRequest())


def attached(url: str) -> LanePeer:
    return LanePeer.of(opened(url), client_name="dying")


def slowly(call: int, ref: tensor_pb2.ArenaRef, turns: int = RUN_TURNS) -> Request:
    request = by_ref(call, ref, "slow")
    request.infer.inputs.append(tensor_of_array("turns", np.array(turns, np.int64)))
    return request


def granted(url: str) -> tuple[LanePeer, tensor_pb2.ArenaRef]:
    peer = attached(url)
    return peer, peer.place(peer.grow(LARGE.nbytes), LARGE)


# Steps of the protocol, packet by packet


def token_issued(url: str) -> Kept:
    return opened(url)


def connected(url: str) -> Kept:
    return connect(opened(url).socket_path)


def hello_unanswered(url: str) -> Kept:
    answer = opened(url)
    sock = connect(answer.socket_path)
    sock.send(hello(token=answer.token).SerializeToString())
    return sock


def growing(url: str) -> Kept:
    """Much memory is being made, and nobody will be there to take it."""
    peer = attached(url)
    peer.send(Request(grow=lane_pb2.GrowRequest(size=64 << 20)))
    return peer


def memory_unread(url: str) -> Kept:
    """The descriptor of new memory waits in the worker, behind answers that nobody reads."""
    peer = attached(url)
    peer.send(*[infer(call) for call in range(1, UNREAD_CALLS)])
    peer.send(Request(grow=lane_pb2.GrowRequest(size=LARGE.nbytes)))
    peer.send(infer(UNREAD_CALLS))
    return peer


def called_slowly(url: str) -> Kept:
    """Queued or running: that is what else the test has running."""
    peer, ref = granted(url)
    peer.send(slowly(1, ref))
    return peer


def called_for_long(url: str) -> Kept:
    """So that a test can look at the run before it ends."""
    peer, ref = granted(url)
    peer.send(slowly(1, ref, LONG_RUN_TURNS))
    return peer


def several_runs(url: str) -> Kept:
    peer, ref = granted(url)
    peer.send(*[slowly(call, ref, 5000) for call in range(1, 6)])
    return peer


def answers_unread(url: str) -> Kept:
    """Results that lie in the output arena, and whose packets wait for a reader."""
    peer, ref = granted(url)
    peer.send(*[by_ref(call, ref, "identity") for call in range(1, 9)])
    peer.send(*[infer(call) for call in range(9, UNREAD_CALLS)])
    return peer


def leased(url: str) -> Kept:
    peer, ref = granted(url)
    response = peer.answer(by_ref(1, ref, "identity"))
    assert np.array_equal(peer.read(response.outputs[0].ref), LARGE)
    return peer


def forked(url: str) -> Kept:
    """The child keeps the socket and the memory."""
    peer = leased(url)
    child = os.fork()
    if not child:
        time.sleep(FORKED_S)
        os._exit(0)
    peer.sock.close()  # only the child has it
    return child


def closing(url: str) -> Kept:
    peer = leased(url)
    peer.send(Request(close=lane_pb2.Close()))
    return peer


def told_goodbye(url: str) -> Kept:
    peer = leased(url)
    peer.sock.send(b"\xff")
    peer.goodbye()
    return peer


def exporting(url: str) -> Kept:
    """A tensor offered where it lies, and a result's copy; nobody has taken either."""
    peer = attached(url)
    alone = peer.place(peer.grow(LARGE.nbytes, alone=True), LARGE)
    shared = peer.place(peer.grow(LARGE.nbytes), LARGE)
    result = peer.answer(by_ref(1, shared, "identity")).outputs[0].ref
    for number, ref in enumerate((alone, result)):
        export = lane_pb2.ExportRequest(
            request=number, ref=ref, data_type=tensor_pb2.DATA_TYPE_FP32, shape=LARGE.shape
        )
        peer.send(Request(export_tensor=export))
        while (response := peer.receive()).WhichOneof("message") != "exported":
            pass
        assert response.exported.token, response
    return peer


# The same with the real clients


def borrowing(url: str) -> Kept:
    client = Client(url, transport="lane")
    filled = client.empty(LARGE.shape)
    filled[:] = LARGE
    first = client.infer("identity", filled, borrow=True)
    second = client.infer("identity", first["y"], borrow=True)
    assert np.array_equal(second["y"], LARGE)
    return client, filled, first, second


def many_futures(url: str) -> Kept:
    client = Client(url, transport="lane")
    return client, [client.submit("identity", LARGE, borrow=True) for _ in range(50)]


def forked_client(url: str) -> Kept:
    """The child lets go of the socket by itself."""
    kept = borrowing(url)
    child = os.fork()
    if not child:
        time.sleep(FORKED_S)
        os._exit(0)
    _forked.append(kept)
    return child


def asyncio_calls(url: str) -> Kept:
    async def start() -> Any:
        client = AsyncClient(url, transport="lane")
        await client.infer("identity", LARGE)
        tasks = [asyncio.ensure_future(client.infer("identity", LARGE)) for _ in range(50)]
        await asyncio.sleep(0)
        return client, tasks

    loop = asyncio.new_event_loop()
    return loop, loop.run_until_complete(start())


_forked: list[Any] = []

STEPS: dict[str, Callable[[str], Kept]] = {
    step.__name__: step
    for step in (
        token_issued,
        connected,
        hello_unanswered,
        attached,
        granted,
        growing,
        memory_unread,
        called_slowly,
        called_for_long,
        several_runs,
        answers_unread,
        leased,
        forked,
        closing,
        told_goodbye,
        exporting,
        borrowing,
        many_futures,
        forked_client,
        asyncio_calls,
    )
}


def call_and_call(pipe: Connection, url: str) -> None:
    """All kinds of packets, one after the other, until it is killed in the middle of any."""
    peer, ref = granted(url)
    pipe.send(peer.attachment.session)
    call = 0
    while True:
        call += 3
        response = peer.answer(by_ref(call, ref, "identity"))
        peer.answer(infer(call + 1, "identity"))
        peer.release(response.outputs[0].ref)
        if call % 30 == 0:
            peer.send(Request(grow=lane_pb2.GrowRequest(size=1 << 16, alone=True)))
            while (memory := peer.receive()).WhichOneof("message") != "chunk":
                pass
            drop = lane_pb2.DropRequest(epoch=memory.chunk.epoch, chunk=memory.chunk.chunk)
            peer.send(Request(drop=drop))
