# SPDX-License-Identifier: Apache-2.0
"""The thread that tells callbacks of a lane's answers, when things go as badly as they can.

The peer is scripted, so that answers come when a test wants them.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from support.lane_reading import WAIT_S, until_no_watcher, value
from support.lanes import ScriptedPeer
from thirdrail import errors
from thirdrail.requests import Result


def test_a_callback_never_runs_where_the_lane_is_read(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for the lane itself: also when the answer is read while it is being added."""
    future = peer.caller.submit("m", value(1))
    (request,) = peer.calls(1)
    told_by: list[str] = []
    told = threading.Event()
    add = Future.add_done_callback

    def add_as_the_answer_is_read(self: Future[Result], fn: Callable[..., object]) -> None:
        add(self, fn)
        if self is future:
            peer.answer(request)
            peer.beside(peer.caller.lane.poll).result(WAIT_S)

    def tell(_: object) -> None:
        told_by.append(threading.current_thread().name)
        told.set()

    monkeypatch.setattr(Future, "add_done_callback", add_as_the_answer_is_read)
    future.add_done_callback(tell)
    assert told.wait(WAIT_S)
    assert told_by == ["thirdrail-watcher"]


def test_whatever_a_callback_raises_the_others_are_told(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their answers and at their timeouts. It is shown as any thread's is."""
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def fail(_: object) -> None:
        raise asyncio.CancelledError  # which is no Exception

    first, told = peer.caller.submit("m", value(1)), threading.Event()
    first.add_done_callback(fail)
    peer.answer(*peer.calls(1))
    until_no_watcher()
    assert len(shown) == 1
    overdue = [peer.caller.submit("m", value(n), timeout=0.05) for n in range(4)]
    for each in overdue[:3]:
        each.add_done_callback(fail)
    overdue[3].add_done_callback(lambda _: told.set())
    assert told.wait(WAIT_S)
    until_no_watcher()
    assert all(isinstance(each.exception(), errors.TimedOut) for each in overdue)
    assert {each.exc_type for each in shown} == {asyncio.CancelledError}
    assert len(shown) == 4


def test_a_cancel_reaches_the_worker_whatever_a_callback_raises(peer: ScriptedPeer) -> None:
    def fail(_: object) -> None:
        raise asyncio.CancelledError

    future = peer.caller.submit("m", value(1))
    future.add_done_callback(fail)
    (request,) = peer.calls(1)
    with pytest.raises(asyncio.CancelledError):
        future.cancel()
    assert peer.receive().cancel.call == request.call
    assert future.cancelled()
    until_no_watcher()


def test_a_thread_that_cannot_start_is_tried_again(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    future = peer.caller.submit("m", value(1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            future.add_done_callback(lambda _: None)
    told = threading.Event()
    other = peer.caller.submit("m", value(2))
    other.add_done_callback(lambda _: told.set())
    for request in peer.calls(2):
        peer.answer(request)
    assert told.wait(WAIT_S)
    until_no_watcher()
