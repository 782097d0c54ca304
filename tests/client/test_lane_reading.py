# SPDX-License-Identifier: Apache-2.0
"""Who reads a lane: threads that take turns, futures that nobody drives, answers in any order.

The peer is scripted, so that answers come when and as a test wants them.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import cast

import pytest

from support.lane_reading import OPTIONS, WAIT_S, until_no_watcher, value, value_of, watchers
from support.lanes import ScriptedPeer
from thirdrail import errors
from thirdrail.lane.blocking import POLL_EVERY_CALLS
from thirdrail.lane.conversation import READ_AHEAD_CALLS_MIN
from thirdrail.lane.futures import LaneFuture
from thirdrail.lane.releases import Releases
from thirdrail.lane.turns import READ_AHEAD_PACKETS_MAX, Ticket, Turns
from thirdrail.requests import Result
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2


def test_threads_get_their_own_answers_in_any_order(peer: ScriptedPeer) -> None:
    asked = [peer.beside(partial(peer.caller.infer, "m", value(n))) for n in range(8)]
    for request in sorted(peer.calls(8), key=lambda each: each.inputs[0].raw, reverse=True):
        peer.answer(request)
    assert [value_of(future.result(WAIT_S)) for future in asked] == list(range(8))
    assert not watchers(), "whoever waits reads"


def test_whoever_has_many_in_flight_takes_in_what_came_for_them(peer: ScriptedPeer) -> None:
    submitted = [peer.caller.submit("m", value(n)) for n in range(READ_AHEAD_CALLS_MIN + 2)]
    futures = [cast(LaneFuture, each) for each in submitted]
    requests = peer.calls(len(futures))
    for request in requests[:3]:
        peer.answer(request)
    assert value_of(futures[0].result(WAIT_S)) == 0
    assert futures[1].call.is_done, "read ahead, as enough was in flight"
    assert futures[2].call.is_done
    for request in requests[3:]:
        peer.answer(request)
    assert [value_of(each.result(WAIT_S)) for each in futures[1:]] == [1, 2, 3, 4, 5]


def test_reading_ahead_has_a_bound() -> None:
    """Or a leader whose answer has come would read for others without end."""
    reads: list[float | None] = []
    ticket = Ticket()

    def read(deadline_s: float | None) -> bool:
        reads.append(deadline_s)
        ticket.is_done = True
        return True

    assert Turns(threading.Lock(), read, lambda: True).wait(ticket, None)
    assert reads == [None] + [0.0] * READ_AHEAD_PACKETS_MAX


def test_the_lead_is_handed_on_when_the_leader_goes(peer: ScriptedPeer) -> None:
    """The first caller leads and is answered first; the other one must then read for himself."""
    first = peer.beside(lambda: peer.caller.infer("m", value(1)))
    [one] = peer.calls(1)
    second = peer.beside(lambda: peer.caller.infer("m", value(2)))
    [two] = peer.calls(1)
    peer.answer(one)
    assert value_of(first.result(WAIT_S)) == 1
    peer.answer(two)
    assert value_of(second.result(WAIT_S)) == 2


def test_the_lead_is_handed_on_when_the_leader_runs_out_of_time(peer: ScriptedPeer) -> None:
    first = peer.beside(lambda: peer.caller.infer("m", value(1), timeout=0.2))
    peer.calls(1)
    second = peer.beside(lambda: peer.caller.infer("m", value(2)))
    messages = [peer.receive() for _ in range(2)]  # in whatever order
    [two] = [each.infer for each in messages if each.HasField("infer")]
    assert any(each.HasField("cancel") for each in messages)
    assert isinstance(first.exception(WAIT_S), errors.TimedOut)
    peer.answer(two)
    assert value_of(second.result(WAIT_S)) == 2


class HookedLock:
    """A lock that does something more before it is let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.before_release: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        while self.before_release:
            self.before_release.pop()()
        self._lock.release()


def test_whoever_needs_the_lead_no_more_hands_it_on() -> None:
    """In the moment in which the first sleeper is offered the lead, his thing has come."""
    lock, go_on = HookedLock(), threading.Event()
    tickets = [Ticket(), Ticket()]

    def read(_deadline_s: float | None) -> bool:
        go_on.wait(WAIT_S)
        if go_on.is_set() and threading.current_thread() in sleepers:
            with lock:
                turns.complete(tickets[1])
        return False

    turns = Turns(cast(threading.Lock, lock), read)
    leader = threading.Thread(target=turns.poll, daemon=True)
    sleepers = [
        threading.Thread(target=turns.wait, args=(each, None), daemon=True) for each in tickets
    ]
    for thread, asleep in zip((leader, *sleepers), (0, 1, 2), strict=True):
        thread.start()
        deadline = time.monotonic() + WAIT_S
        while turns.sleepers < asleep:
            assert time.monotonic() < deadline
    lock.before_release = [lambda: turns.complete(tickets[0])]
    go_on.set()
    for thread in (leader, *sleepers):
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_follower_that_runs_out_of_time_leaves_the_others_alone(peer: ScriptedPeer) -> None:
    first = peer.beside(lambda: peer.caller.infer("m", value(1)))
    [one] = peer.calls(1)
    second = peer.beside(lambda: peer.caller.infer("m", value(2), timeout=0.2))
    [two] = peer.calls(1)
    assert isinstance(second.exception(WAIT_S), errors.TimedOut)
    peer.answer(two)  # too late, for nobody
    peer.answer(one)
    assert value_of(first.result(WAIT_S)) == 1


def test_a_future_is_driven_by_whoever_asks(peer: ScriptedPeer) -> None:
    futures = [peer.caller.submit("m", value(n)) for n in range(3)]
    requests = peer.calls(3)
    with pytest.raises(concurrent.futures.TimeoutError):
        futures[0].result(0.01)
    for request in reversed(requests):
        peer.answer(request)
    assert [value_of(future.result(WAIT_S)) for future in futures] == [0, 1, 2]
    assert futures[1].exception() is None
    assert not watchers()


def test_done_looks_at_what_has_come(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(5))
    [request] = peer.calls(1)
    assert not future.done()
    peer.answer(request)
    assert future.done()
    assert value_of(future.result(0)) == 5


def test_answers_are_taken_in_while_more_is_asked(peer: ScriptedPeer) -> None:
    """Else the results of many futures would fill the worker's memory before anybody looks."""
    for number in range(POLL_EVERY_CALLS - 4):
        answered = peer.caller.submit("m", value(number))
        peer.answer(*peer.calls(1))
        answered.result(WAIT_S)
    first = peer.caller.submit("m", value(1))
    peer.answer(*peer.calls(1))
    for number in range(3):
        assert not Future.done(first), "nobody has looked yet"
        peer.caller.submit("m", value(number))
    assert Future.done(first)


def test_waiting_for_several_needs_no_driver(peer: ScriptedPeer) -> None:
    futures = [peer.caller.submit("m", value(n)) for n in range(4)]
    requests = peer.calls(4)
    assert not concurrent.futures.wait(futures, 0.01).done
    assert watchers()
    for request in requests[:2]:
        peer.answer(request)
    waited = concurrent.futures.wait(futures[:2], WAIT_S)
    assert waited.done == set(futures[:2])
    for request in reversed(requests[2:]):
        peer.answer(request)
    ended = [value_of(each.result(0)) for each in concurrent.futures.as_completed(futures, WAIT_S)]
    assert sorted(ended) == [0, 1, 2, 3]
    until_no_watcher()


def test_a_callback_may_call_itself(peer: ScriptedPeer) -> None:
    """It runs where nobody else is held up, and may wait for the lane."""
    seen: Future[int] = Future()

    def go_on(ended: "Future[Result]") -> None:
        seen.set_result(value_of(peer.caller.infer("m", value(value_of(ended.result()) + 1))))

    future = peer.caller.submit("m", value(1))
    future.add_done_callback(go_on)
    for _ in range(2):
        peer.answer(*peer.calls(1))
    assert seen.result(WAIT_S) == 2
    until_no_watcher()


def test_a_callback_on_an_ended_future_runs_at_once(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(1))
    peer.answer(*peer.calls(1))
    future.result(WAIT_S)
    seen: list[object] = []
    future.add_done_callback(seen.append)
    assert seen == [future]
    assert not watchers()


NOT_FOUND = pb.Status(reason=pb.REASON_NOT_FOUND, message="no such model")


@pytest.mark.parametrize("is_read_by_watcher", [False, True])
@pytest.mark.parametrize("how", ["callback", "wait"])
def test_who_comes_late_hears_of_a_model_that_is_not_there(
    peer: ScriptedPeer, how: str, is_read_by_watcher: bool
) -> None:
    """Its answer was read for others, and nobody has asked the server about it."""
    future = peer.caller.submit("m", value(1))
    [request], watched = peer.calls(1), peer.caller.submit("m", value(2))
    if is_read_by_watcher:
        watched.add_done_callback(lambda _: None)
    peer.answer(request, status=NOT_FOUND, outputs=[])
    while not cast(LaneFuture, future).call.is_done:
        peer.caller.lane.poll()
        time.sleep(0.001)
    if how == "callback":
        told: Future[object] = Future()
        future.add_done_callback(told.set_result)
        told.result(WAIT_S)
    else:
        assert concurrent.futures.wait([future], WAIT_S).done
    assert isinstance(future.exception(0), errors.NotFound)
    assert watched.cancel()
    until_no_watcher()


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_server_that_cannot_be_asked_ends_the_future(
    peer: ScriptedPeer, is_watched: bool
) -> None:
    """About a model that the worker does not know: the client may be closed meanwhile."""

    def why_missing(_: errors.NotFound) -> errors.ThirdrailError:
        raise errors.FailedPrecondition("this client is closed")

    future = peer.caller.lane.submit(OPTIONS, value(1), why_missing=why_missing)
    if is_watched:
        told: Future[object] = Future()
        future.add_done_callback(told.set_result)
    peer.answer(*peer.calls(1), status=NOT_FOUND, outputs=[])
    if is_watched:
        told.result(WAIT_S)
    for _ in range(2):
        with pytest.raises(errors.FailedPrecondition, match="is closed"):
            future.result(WAIT_S)
    until_no_watcher()


def test_who_finds_nothing_to_give_back_says_nothing(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread was faster; an empty packet would end the session."""
    talk = peer.caller.lane.talk
    monkeypatch.setattr(Releases, "__bool__", lambda _: True)
    talk.flush()
    monkeypatch.undo()
    talk.memory.releases.add(2, slot=3, generation=1, size=1)
    talk.flush()
    [lease] = peer.receive().releases
    assert lease.slot == 3


def test_a_cancelled_future_ends_at_once(peer: ScriptedPeer) -> None:
    gone, kept = peer.caller.submit("m", value(1)), peer.caller.submit("m", value(2))
    requests = peer.calls(2)
    assert gone.cancel()
    assert gone.cancel(), "as often as one likes"
    assert peer.receive().cancel.call == requests[0].call
    assert gone in concurrent.futures.wait([gone], 0).done
    with pytest.raises(concurrent.futures.CancelledError):
        gone.result()
    for request in requests:
        peer.answer(request)
    assert value_of(kept.result(WAIT_S)) == 2
    assert not kept.cancel(), "it has ended"


def test_a_future_keeps_the_timeout_of_its_request(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(1), timeout=0.05)
    peer.calls(1)
    with pytest.raises(errors.TimedOut, match=r"no answer within 0\.05 s"):
        future.result()
    assert peer.receive().HasField("cancel")


def test_too_many_in_flight_wait_for_an_answer(peer: ScriptedPeer) -> None:
    most = peer.LIMITS.calls_in_flight
    futures = [peer.caller.submit("m", value(n)) for n in range(most)]
    requests = peer.calls(most)
    with pytest.raises(errors.TimedOut):
        peer.caller.infer("m", value(0), timeout=0.02)
    another = peer.beside(lambda: peer.caller.submit("m", value(99)))
    time.sleep(0.02)
    assert not another.done()
    peer.answer(requests[0])
    peer.answer(*peer.calls(1))
    assert value_of(another.result(WAIT_S).result(WAIT_S)) == 99
    assert value_of(futures[0].result(WAIT_S)) == 0


def test_parts_of_answers_and_strangers_answers_are_passed_over(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(1))
    [request] = peer.calls(1)
    part = pb.InferResponse(call=request.call, outputs=request.inputs)
    peer.send(lane_pb2.LaneResponse(infer=part))
    peer.answer(pb.InferRequest(call=12345))
    peer.answer(request)
    assert value_of(future.result(WAIT_S)) == 1
