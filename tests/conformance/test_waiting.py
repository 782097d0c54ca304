# SPDX-License-Identifier: Apache-2.0
"""Requests that wait: queues that are full, timeouts that pass, callers that give up.

The model `narrow` runs one request at a time and lets one wait.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from conformance.test_refusals import assert_failed
from support.callers import Answer, Ask, Caller, Pending, WireTensor, tensors
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import metrics_pb2

WAIT_S_MAX = 30
HOLDS = 100_000  # turns of `narrow`: 0.5 s at least
TIMEOUT_US = 50_000  # far less


def narrow(turns: int = 1, *, model: str = "narrow", timeout_us: int = 0) -> Ask:
    inputs: list[WireTensor] = [*tensors(x=np.zeros(1, np.float32), turns=np.array(turns))]
    return Ask(model, inputs, timeout_us=timeout_us)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class WasOver(Exception):
    """The run had ended before what was to happen meanwhile, as it may on a busy machine."""


@dataclass(frozen=True, slots=True)
class Held:
    """A request that runs."""

    pending: Pending

    def until(self, is_so: Callable[[], bool]) -> None:
        """While it runs. Raises WasOver."""
        until(lambda: self.pending.future.done() or is_so())
        self.still_runs()

    def still_runs(self) -> None:
        if self.pending.future.done():
            raise WasOver


@contextmanager
def held(caller: Caller, turns: int) -> Iterator[Held]:
    """A run of `narrow`, which has been answered at the end."""
    until(lambda: is_idle(caller, "narrow"))
    first = Held(caller.submit(narrow(turns)))
    first.until(lambda: caller.counters("narrow").running == 1)
    try:
        yield first
    finally:
        until(lambda: is_idle(caller, "narrow"))


def meanwhile(act: Callable[[int], None]) -> None:
    """What is to happen during a run of so many turns; during a longer one if that was over."""
    try:
        act(HOLDS)
    except WasOver:
        act(20 * HOLDS)


def is_idle(caller: Caller, model: str) -> bool:
    counters = caller.counters(model)
    return not counters.running and not counters.queued


def test_a_full_queue_refuses_at_once(caller: Caller) -> None:
    def act(turns: int) -> None:
        before = caller.counters("narrow")
        with held(caller, turns) as running:
            waiting = caller.submit(narrow())
            running.until(lambda: caller.counters("narrow").queued == 1)
            refused = caller.submit(narrow())
            running.until(
                lambda: caller.counters("narrow").requests_refused > before.requests_refused
            )  # nobody is made to wait for a refusal
            text = "Exceeds maximum queue size"
            assert_failed(caller, refused.result(), pb.REASON_QUEUE_FULL, text)
            assert isinstance(running.pending.result(), Answer)
            assert isinstance(waiting.result(), Answer)

    meanwhile(act)


def test_a_timeout_ends_what_waits_and_nothing_else(caller: Caller) -> None:
    def act(turns: int) -> None:
        before = caller.counters("narrow")
        with held(caller, turns) as running:
            late = caller.submit(narrow(timeout_us=TIMEOUT_US))
            running.until(
                lambda: caller.counters("narrow").requests_timed_out > before.requests_timed_out
            )
            assert_failed(caller, late.result(), pb.REASON_TIMED_OUT, "Request timeout expired")
            assert isinstance(running.pending.result(), Answer)
        assert caller.counters("narrow").batches == before.batches + 1, "it was never run"

    meanwhile(act)


def test_a_timeout_that_does_not_pass_changes_nothing(caller: Caller) -> None:
    assert isinstance(caller.submit(narrow(timeout_us=60_000_000)).result(), Answer)
    until(lambda: is_idle(caller, "narrow"))  # the answer may come before it is counted


def test_a_cancelled_request_leaves_the_queue(caller: Caller) -> None:
    def act(turns: int) -> None:
        before = caller.counters("narrow")
        with held(caller, turns) as running:
            waiting = caller.submit(narrow())
            running.until(lambda: caller.counters("narrow").queued == 1)
            waiting.cancel()  # on a KServe stream that cancels both
            until(lambda: has_left_or_run(caller, before))
            if caller.counters("narrow").batches >= before.batches + 2:
                raise WasOver
            until(lambda: caller.counters("narrow").queued == 0)
        assert isinstance(caller.submit(narrow()).result(), Answer)
        until(lambda: is_idle(caller, "narrow"))
        assert caller.counters("narrow").batches == before.batches + 2, "it was never run"

    meanwhile(act)


def has_left_or_run(caller: Caller, before: metrics_pb2.ModelCounters) -> bool:
    now = caller.counters("narrow")
    return now.requests_cancelled > before.requests_cancelled or now.batches >= before.batches + 2


def test_cancelling_what_runs_frees_its_caller_at_once(caller: Caller) -> None:
    def act(turns: int) -> None:
        before = caller.counters("narrow")
        with held(caller, turns) as running:
            running.pending.cancel()
            until(lambda: caller.counters("narrow").running == 0)
        if caller.counters("narrow").requests_cancelled == before.requests_cancelled:
            raise WasOver

    meanwhile(act)


def test_whenever_a_cancel_comes_the_request_ends_once(caller: Caller) -> None:
    """It may not even have started by then, or its answer may be on its way."""
    calls: list[Pending] = []
    for turns in (1, 200, 400) * 8:
        calls.append(caller.submit(narrow(turns, model="slow")))
        calls[-1].cancel()
    until(lambda: all(call.future.done() for call in calls))
    until(lambda: is_idle(caller, "slow"))
    assert isinstance(caller.submit(narrow(model="slow")).result(), Answer)
