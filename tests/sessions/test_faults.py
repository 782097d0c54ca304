# SPDX-License-Identifier: Apache-2.0
"""Our own faults while a packet is taken: whoever waits is told, and the others go on."""

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import pytest

from support.lane_peer import LanePeer, Request, Response, infer
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import WorkerConfig
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.session_memory import SessionMemory
from thirdrail_server.worker.sessions import SessionTable

REPLY_S_MAX = 60


def fail(*_: object) -> NoReturn:
    raise ZeroDivisionError("a fault of ours")


class FaultyModels:
    find = staticmethod(fail)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, LanePeer]]:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        yield theirs, LanePeer(ours)


def talk(pair: tuple[socket.socket, LanePeer], *requests: Request) -> list[Response | None]:
    """What is answered to each, in order; None: the session ended. All but the hello."""
    theirs, peer = pair

    async def serve() -> list[Response | None]:
        sessions = SessionTable(WorkerConfig(), cast("ModelTable", FaultyModels()), lambda _: None)
        sessions.inherit(theirs, is_front=True)
        answers: list[Response | None] = []
        await asyncio.wait_for(asyncio.to_thread(peer.attach), REPLY_S_MAX)
        for request in requests:
            try:
                peer.send(request)
                answers.append(await asyncio.wait_for(asyncio.to_thread(peer.receive), REPLY_S_MAX))
            except (EOFError, BrokenPipeError):
                answers.append(None)
        sessions.close()
        return answers

    return asyncio.run(serve())


def test_a_request_that_cannot_be_read_is_answered_and_the_next_one_too(
    pair: tuple[socket.socket, LanePeer], caplog: pytest.LogCaptureFixture
) -> None:
    answers = talk(pair, infer(1, "m"), infer(2, "m"))
    for call, answer in enumerate(answers, 1):
        assert answer is not None
        assert answer.infer.call == call
        assert answer.infer.final
        assert answer.infer.status.reason == pb.REASON_INTERNAL
        assert "its log says why" in answer.infer.status.message
        assert "a fault of ours" not in answer.infer.status.message
    assert [each.exc_info is not None for each in caplog.records if "read" in each.message]


def test_a_session_whose_packet_cannot_be_taken_is_told_and_ends(
    pair: tuple[socket.socket, LanePeer],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SessionMemory, "grow", fail)
    grow = Request(grow=lane_pb2.GrowRequest(size=1))
    with caplog.at_level(logging.ERROR):
        goodbye, end = cast("Any", talk(pair, grow, grow))
    assert goodbye.goodbye.status.reason == pb.REASON_INTERNAL
    assert end is None
    assert "a packet could not be taken" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_host_that_gives_no_memory_is_named_to_the_client(
    pair: tuple[socket.socket, LanePeer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(size: int, *, client_writes: bool) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("thirdrail_server.worker.sessions.create_chunk", make)
    [answer] = talk(pair, Request(grow=lane_pb2.GrowRequest(size=1)))
    assert answer is not None
    assert answer.grow_refused.message == "the worker can make no memory: Too many open files"
