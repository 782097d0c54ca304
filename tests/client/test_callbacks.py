# SPDX-License-Identifier: Apache-2.0
"""Callbacks of futures over gRPC: they may do what they like, and hold up no answer."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from support.echo import EchoServer
from thirdrail import Client, Result, errors

X = {"x": np.array([[1, 2]], np.float32)}
WAIT_S = 60
Submit = Callable[..., "Future[Result]"]


@pytest.fixture(params=["stream", "single calls"])
def submit(request: pytest.FixtureRequest, client: Client) -> Iterator[Submit]:
    if request.param == "single calls":
        yield client.submit
        return
    with client.stream(in_flight_max=2) as stream:
        yield stream.submit


def test_a_callback_may_wait_for_other_futures(submit: Submit, echo: EchoServer) -> None:
    held, told = submit("held", X, request_id="first"), Future[list[str]]()

    def go_on(_: "Future[Result]") -> None:
        futures = [submit("echo", X, request_id=str(n)) for n in range(3)]  # more than the bound
        told.set_result([future.result(WAIT_S).request_id for future in futures])

    held.add_done_callback(go_on)
    echo.release.set()
    assert told.result(WAIT_S) == ["0", "1", "2"]


def test_callbacks_come_in_turn_and_none_is_held_up_by_what_another_raises(
    submit: Submit, echo: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    held, seen, told = submit("held", X), list[object](), threading.Event()

    def fail(_: "Future[Result]") -> None:
        raise ValueError("a fault of the callback's")

    held.add_done_callback(seen.append)
    held.add_done_callback(fail)
    held.add_done_callback(seen.append)
    held.add_done_callback(lambda _: told.set())
    with caplog.at_level(logging.ERROR):
        echo.release.set()
        assert told.wait(WAIT_S)
    assert seen == [held, held]
    assert "a fault of the callback's" in caplog.text


def test_a_callback_on_an_ended_future_runs_at_once(submit: Submit) -> None:
    future, seen = submit("echo", X), list[object]()
    future.result(WAIT_S)
    future.add_done_callback(seen.append)
    assert seen == [future]


def test_who_cancels_is_told_of_it_as_well(submit: Submit, echo: EchoServer) -> None:
    held, told = submit("held", X, request_id="gone"), threading.Event()
    held.add_done_callback(lambda _: told.set())
    assert held.cancel()
    assert told.wait(WAIT_S)
    echo.release.set()  # this server knows no cancelling, and a stream is left when all is answered


def test_a_failed_call_is_told(submit: Submit) -> None:
    failed = submit("fails", X, parameters={"reason": "REASON_NOT_FOUND"})
    told = Future[BaseException | None]()
    failed.add_done_callback(lambda ended: told.set_result(ended.exception()))
    assert isinstance(told.result(WAIT_S), errors.NotFound)
