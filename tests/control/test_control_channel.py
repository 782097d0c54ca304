# SPDX-License-Identifier: Apache-2.0
"""The control channel over a real socket pair, with an honest and with a lying other end."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from thirdrail.errors import Internal, NotFound, QueueFull, ResourceExhausted
from thirdrail_server.control_channel import (
    ChannelClosed,
    ChannelLimits,
    ControlChannel,
    Fields,
    OnProgress,
    open_channel,
)

LIMITS = ChannelLimits(control_line_bytes_max=4096, control_calls_max=4)


async def answer(do: str, fields: Fields, progress: OnProgress) -> Fields:
    match do:
        case "echo":
            return fields
        case "count":
            for step in range(3):
                progress({"step": step})
            return {"steps": 3}
        case "refuse":
            raise QueueFull("not one more")
        case "fail":
            raise ZeroDivisionError("secret")
        case "long":
            return {"text": "x" * 5000}
        case "wait":
            await asyncio.sleep(3600)
    raise NotFound(do)


@contextlib.asynccontextmanager
async def channels(**ours: Any) -> AsyncIterator[tuple[ControlChannel, ControlChannel]]:
    left, right = socket.socketpair()
    a = await open_channel(left, LIMITS, **ours)
    b = await open_channel(right, LIMITS, serve=answer)
    try:
        yield a, b
    finally:
        await a.close()
        await b.close()


@contextlib.asynccontextmanager
async def against_raw_peer() -> AsyncIterator[tuple[ControlChannel, socket.socket, asyncio.Event]]:
    left, right = socket.socketpair()
    right.setblocking(False)
    is_over = asyncio.Event()
    channel = await open_channel(left, LIMITS, serve=answer, on_close=is_over.set)
    with right:
        yield channel, right, is_over
        await channel.close()


async def _asked(peer: socket.socket, count: int) -> list[int]:
    lines = b""
    while lines.count(b"\n") < count:
        lines += await asyncio.get_running_loop().sock_recv(peer, 4096)
    return [json.loads(line)["id"] for line in lines.splitlines()]


async def _answer_to(peer: socket.socket, number: int) -> None:
    await asyncio.get_running_loop().sock_sendall(peer, b'{"id": %d, "ok": {}}\n' % number)


async def test_calls_overlap_and_each_gets_its_own_answer() -> None:
    async with channels() as (a, _):
        answers = await asyncio.gather(*(a.call("echo", {"n": n}) for n in range(4)))
    assert answers == [{"n": n} for n in range(4)]


async def test_both_ends_can_ask() -> None:
    async with channels(serve=answer) as (a, b):
        assert await b.call("echo", {"from": "b"}) == {"from": "b"}
        assert await a.call("echo", {"from": "a"}) == {"from": "a"}


async def test_progress_comes_in_order_and_before_the_answer() -> None:
    seen: list[Fields] = []
    async with channels() as (a, _):
        assert await a.call("count", on_progress=seen.append) == {"steps": 3}
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]


async def test_errors_keep_their_class_and_text() -> None:
    async with channels() as (a, _):
        with pytest.raises(QueueFull, match="not one more"):
            await a.call("refuse")


async def test_an_unexpected_failure_tells_nothing_of_itself() -> None:
    async with channels() as (a, _):
        with pytest.raises(Internal) as failure:
            await a.call("fail")
    assert "secret" not in str(failure.value)


async def test_a_line_too_long_is_refused_by_its_sender_and_harms_nobody() -> None:
    async with channels() as (a, _):
        with pytest.raises(ResourceExhausted):
            await a.call("echo", {"text": "x" * 5000})
        with pytest.raises(ResourceExhausted):
            await a.call("long")
        assert await a.call("echo", {"still": "there"}) == {"still": "there"}


async def test_at_the_bound_a_call_waits_for_the_answer_to_another() -> None:
    async with against_raw_peer() as (channel, peer, _):
        calls = [asyncio.create_task(channel.call("something")) for _ in range(5)]
        asked = await _asked(peer, 4)
        await _answer_to(peer, asked[0])
        asked += await _asked(peer, 1)
        for number in asked[1:]:
            await _answer_to(peer, number)
        assert await asyncio.gather(*calls) == [{}] * 5


async def test_a_call_that_was_given_up_counts_until_the_other_end_has_answered_it() -> None:
    """The other end serves it all the same, and hangs up on who asks for more than it may."""
    async with against_raw_peer() as (channel, peer, _):
        for _ in range(3):
            calls = [asyncio.create_task(channel.call("something")) for _ in range(9)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        last = asyncio.create_task(channel.call("something"))
        asked = await _asked(peer, 4)
        assert asked == [1, 2, 3, 4]
        assert not last.done()
        await _answer_to(peer, 1)
        assert await _asked(peer, 1) == [5]
        await _answer_to(peer, 5)
        assert await last == {}


async def test_whoever_waits_at_the_bound_hears_of_the_end() -> None:
    async with channels() as (a, b):
        waiting = [asyncio.create_task(a.call("wait")) for _ in range(9)]
        await asyncio.sleep(0)
        await b.close()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in ends} == {ChannelClosed}


async def test_the_end_of_the_file_fails_what_is_unanswered_and_is_told_once() -> None:
    ends: list[str] = []
    async with channels(on_close=lambda: ends.append("end")) as (a, b):
        waiting = asyncio.create_task(a.call("wait"))
        await asyncio.sleep(0)
        await b.close()
        with pytest.raises(ChannelClosed):
            await waiting
        with pytest.raises(ChannelClosed):
            await a.call("echo")
    assert ends == ["end"]


async def test_a_listener_to_progress_who_fails_leaves_nobody_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_fields: Fields) -> None:
        raise ValueError("our own fault")

    async with channels() as (a, _):
        with pytest.raises(ChannelClosed, match=r"this end .* failed"):
            await a.call("count", on_progress=fail)
    assert "our own fault" in caplog.text


async def test_our_own_close_is_not_told() -> None:
    ends: list[str] = []
    async with channels(on_close=lambda: ends.append("end")) as (a, _):
        waiting = asyncio.create_task(a.call("wait"))
        await asyncio.sleep(0)
        await a.close()
        with pytest.raises(ChannelClosed):
            await waiting
    assert ends == []


async def test_an_answer_to_a_caller_who_gave_up_is_dropped() -> None:
    async with against_raw_peer() as (channel, peer, is_over):
        loop = asyncio.get_running_loop()
        call = asyncio.create_task(channel.call("something"))
        number = json.loads(await loop.sock_recv(peer, 4096))["id"]
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await loop.sock_sendall(peer, b'{"id": %d, "ok": {}}\n' % number)
        await loop.sock_sendall(peer, b'{"id": 1, "do": "echo", "with": {}}\n')
        assert json.loads(await loop.sock_recv(peer, 4096)) == {"id": 1, "ok": {}}
        assert not is_over.is_set()


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n",
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"id": "x", "ok": {}}\n',
        b'{"id": 99, "ok": {}}\n',
        b'{"id": -1, "error": {"reason": "REASON_INTERNAL", "message": ""}}\n',
        b'{"id": 1, "error": "no object"}\n',
        b'{"id": 1, "do": "echo", "with": []}\n',
        b"[" * 3000 + b"\n",
        b"x" * 10_000 + b"\n",
    ],
    ids=lambda line: repr(line[:12]),
)
async def test_nonsense_ends_the_channel(line: bytes) -> None:
    async with against_raw_peer() as (channel, peer, is_over):
        await asyncio.get_running_loop().sock_sendall(peer, line)
        await is_over.wait()
        with pytest.raises(ChannelClosed):
            await channel.call("echo")


async def test_a_peer_that_asks_too_much_at_once_is_cut_off() -> None:
    async with against_raw_peer() as (_, peer, is_over):
        calls = b"".join(b'{"id": %d, "do": "wait", "with": {}}\n' % n for n in range(5))
        await asyncio.get_running_loop().sock_sendall(peer, calls)
        await is_over.wait()
