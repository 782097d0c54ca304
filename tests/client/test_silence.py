# SPDX-License-Identifier: Apache-2.0
"""A server that takes connections and says nothing: every timeout holds."""

import socket
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from thirdrail import Client, aio_server_calls, errors, failures, server_calls
from thirdrail.aio import AsyncClient

X = {"x": np.ones(4, np.float32)}
SILENCE = "no answer within 0.05 s"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        yield f"unix:{tmp_path / 's'}"


@pytest.mark.parametrize("x", [X, [1, 2]], ids=["arrays", "plain values"])
def test_a_request_ends_in_time(url: str, x: object) -> None:
    """Plain values ask for the model's declaration first."""
    with (
        Client(url, transport="grpc") as client,
        pytest.raises(errors.TimedOut, match=SILENCE),
    ):
        client.infer("m", x, timeout=0.05)


async def test_a_request_ends_in_time_on_a_loop(url: str) -> None:
    async with AsyncClient(url, transport="grpc") as client:
        for x in (X, [1, 2]):
            with pytest.raises(errors.TimedOut, match=SILENCE):
                await client.infer("m", x, timeout=0.05)


@pytest.mark.parametrize("timeout", [-1.0, float("inf")])
def test_the_timeout_is_looked_at_before_anybody_is_asked(url: str, timeout: float) -> None:
    with (
        Client(url, transport="grpc") as client,
        pytest.raises(errors.InvalidArgument, match="timeout must be"),
    ):
        client.infer("m", [1, 2], timeout=timeout)


def test_waiting_until_it_is_ready_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_calls, "ready_answer_seconds", lambda _: 0.05)
    with (
        Client(url) as client,
        pytest.raises(errors.TimedOut, match=f"not ready within 0.01 s: {SILENCE}"),
    ):
        client.wait_ready(0.01)


@pytest.mark.parametrize(
    "ask",
    [
        *map(methodcaller, ("models", "health", "metrics", "snapshot")),
        methodcaller("describe", "m"),
    ],
)
async def test_what_is_answered_at_once_is_not_waited_for_for_ever(
    url: str, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Any], Any]
) -> None:
    for module in (server_calls, aio_server_calls):
        monkeypatch.setattr(module, "ANSWER_SECONDS_MAX", 0.05)
    with Client(url) as client, pytest.raises(errors.TimedOut, match=SILENCE):
        ask(client)
    async with AsyncClient(url) as client:
        with pytest.raises(errors.TimedOut, match=SILENCE):
            await ask(client)


def test_who_stands_still_need_not_be_started() -> None:
    """gRPC gives up after 20 s by itself, in these words."""
    details = "connection attempt timed out before receiving SETTINGS frame"
    unavailable = grpc.StatusCode.UNAVAILABLE
    error = failures.error_of_call(unavailable, details, (), address="here", timeout=None)
    assert error.__notes__ == [failures.STANDS_STILL]


def test_how_long_one_answer_may_take() -> None:
    allowed = server_calls.ready_answer_seconds
    assert allowed(float("-inf")) == 1
    assert allowed(float("inf")) == server_calls.READY_ANSWER_SECONDS_MAX
