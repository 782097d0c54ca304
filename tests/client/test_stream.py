# SPDX-License-Identifier: Apache-2.0
"""Streams of the blocking client: order, bounds, cancelling, and failures of one and of all."""

import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from support.echo import EchoServer
from thirdrail import Client, Stream, Unreachable, errors
from thirdrail.aio import AsyncClient

X = {"x": np.array([[1, 2]], np.float32)}


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.005)


def test_every_answer_finds_its_request(client: Client) -> None:
    with client.stream() as stream:
        futures = [stream.submit("echo", {"x": np.full(2, n)}) for n in range(300)]
        assert [future.result()["x"][0] for future in futures] == list(range(300))


def test_answers_may_overtake(client: Client, echo: EchoServer) -> None:
    with client.stream() as stream:
        slow = stream.submit("held", X, request_id="slow")
        assert stream.submit("echo", X, request_id="fast").result().request_id == "fast"
        assert not slow.done()
        echo.release.set()
        assert slow.result().request_id == "slow"


def test_leaving_waits_for_every_answer(client: Client, echo: EchoServer) -> None:
    with client.stream() as stream:
        future = stream.submit("held", X)
        until(lambda: echo.in_flight_most)
        echo.release.set()
    assert future.done()
    assert repr(stream).endswith("closed, 0 in flight>")
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        stream.submit("echo", X)


def test_no_more_than_the_bound_are_in_flight(client: Client, echo: EchoServer) -> None:
    with client.stream(in_flight_max=4) as stream, ThreadPoolExecutor(1) as pool:
        held = [stream.submit("held", X) for _ in range(4)]
        fifth = pool.submit(stream.submit, "held", X)
        until(lambda: echo.in_flight_most == 4)
        time.sleep(0.05)
        assert not fifth.done()
        assert held[0].cancel()
        fifth.result().cancel()
        for future in held:
            future.cancel()
        until(lambda: len(echo.cancelled) == 5)
        echo.release.set()
    assert echo.in_flight_most == 4


def test_cancelling_one_hurts_no_other(client: Client, echo: EchoServer) -> None:
    with client.stream() as stream:
        kept, gone = (
            stream.submit("held", X, request_id="kept"),
            stream.submit("held", X, request_id="gone"),
        )
        until(lambda: echo.in_flight_most == 2)
        assert gone.cancel()
        until(lambda: echo.cancelled == ["gone"])
        echo.release.set()
        stream.submit("echo", X).result()
        assert kept.result().request_id == "kept"
        with pytest.raises(CancelledError):
            gone.result()


def test_a_failed_request_is_its_own(client: Client) -> None:
    with client.stream() as stream:
        failed = stream.submit("fails", X, parameters={"reason": "REASON_QUEUE_FULL"})
        error = failed.exception()
        assert isinstance(error, errors.QueueFull)
        assert "fewer requests" in error.__notes__[0]
        assert stream.submit("echo", X).result()["x"].shape == (1, 2)


def test_an_answer_in_parts_is_refused(client: Client) -> None:
    with client.stream() as stream:
        with pytest.raises(errors.Unimplemented, match="answers in parts"):
            stream.submit("in parts", X).result()
        stream.submit("echo", X).result()


def test_inputs_that_cannot_be_sent_take_no_room(client: Client) -> None:
    with client.stream(in_flight_max=1) as stream:
        for _ in range(3):
            with pytest.raises(errors.InvalidArgument):
                stream.submit("echo", {"x": np.complex64(1)})
        stream.submit("echo", X).result()


def test_a_broken_stream_fails_all_that_wait(client: Client, echo: EchoServer) -> None:
    with client.stream(in_flight_max=2) as stream, ThreadPoolExecutor(1) as pool:
        held = stream.submit("held", X)
        until(lambda: echo.in_flight_most)
        breaking = stream.submit("breaks", X)
        blocked = pool.submit(stream.submit, "echo", X)
        for future in (held, breaking, blocked):
            assert isinstance(future.exception(), Unreachable)
        with pytest.raises(Unreachable, match=r"has ended, open another one: .*the stream broke"):
            stream.submit("echo", X)


def test_an_exception_inside_cancels_what_is_open(client: Client, echo: EchoServer) -> None:
    def leave(stream: Stream) -> None:
        with stream:
            held.append(stream.submit("held", X))
            until(lambda: echo.in_flight_most)
            raise KeyError("mine")

    held: list[object] = []
    with pytest.raises(KeyError, match="mine"):
        leave(client.stream())
    [future] = held
    error = future.exception()  # type: ignore[attr-defined]
    assert isinstance(error, errors.Cancelled)
    assert str(error) == "the stream was left by an exception"


def test_a_stream_must_be_entered(client: Client) -> None:
    with pytest.raises(errors.FailedPrecondition, match="with"):
        client.stream().submit("echo", X)


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_a_stream_without_room_is_refused(client_class: type[Client | AsyncClient]) -> None:
    with pytest.raises(errors.InvalidArgument, match="in_flight_max must be 1 or more, got 0"):
        client_class("unix:/nobody").stream(in_flight_max=0)


def test_a_forked_child_is_refused(client: Client) -> None:
    with client.stream() as stream:
        stream.submit("echo", X).result()
        stream._pid = os.getpid() + 1  # as if forked
        with pytest.raises(errors.FailedPrecondition, match="process that opened it"):
            stream.submit("echo", X)
