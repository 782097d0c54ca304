# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a client at each step of the protocol: nothing of it is left."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from support.dying import LARGE, LONG_RUN_TURNS, call_and_call, die_at
from support.holdings import Watch
from support.killable import Killable, killable, until
from support.server import RunningServer
from thirdrail import Client
from thirdrail.v1.sessions_pb2 import (
    SESSION_STATE_ACTIVE,
    SESSION_STATE_ATTACHED,
    SESSION_STATE_DRAINING,
    SESSION_STATE_QUARANTINE,
    SessionInfo,
)

IsReached = Callable[[SessionInfo], bool]

# What the server says of a session at each step that has one.
SESSIONS: dict[str, IsReached] = {
    "hello_unanswered": lambda s: s.state == SESSION_STATE_ATTACHED,
    "attached": lambda s: (s.state, s.input_bytes) == (SESSION_STATE_ATTACHED, 0),
    "granted": lambda s: (s.state, s.input_bytes) == (SESSION_STATE_ACTIVE, LARGE.nbytes),
    "memory_unread": lambda s: s.calls >= 1000 and s.input_bytes > 0,
    "several_runs": lambda s: s.calls == 5,
    "answers_unread": lambda s: s.leases >= 8,
    "leased": lambda s: (s.leases, s.leased_bytes) == (1, LARGE.nbytes),
    "told_goodbye": lambda s: s.state == SESSION_STATE_QUARANTINE and s.output_bytes > 0,
    "exporting": lambda s: s.exports == 2 and s.shared_bytes == 2 * LARGE.nbytes,
    "borrowing": lambda s: s.leases == 2 and s.input_bytes > 0,
    "many_futures": lambda s: s.calls == 50,
    "asyncio_calls": lambda s: s.calls > 1,
}


@contextlib.contextmanager
def client_at(server: RunningServer, step: str) -> Iterator[Killable]:
    with killable(die_at, server.url, step) as child:
        yield child


@pytest.mark.parametrize("step", SESSIONS)
def test_a_killed_client_leaves_nothing(server: RunningServer, watch: Watch, step: str) -> None:
    with client_at(server, step) as child:
        child.hear()
        until(lambda: watch.has(child.pid, SESSIONS[step]), watch.others)
        child.kill()
        watch.until_back()


def test_killed_before_its_hello(server: RunningServer, watch: Watch) -> None:
    with client_at(server, "connected") as child:
        child.hear()
        until(lambda: watch.holdings().sessions == watch.before.sessions + 1)
        child.kill()
        watch.until_back()


def test_killed_while_its_memory_is_made(server: RunningServer, watch: Watch) -> None:
    """At whatever moment of it: nobody takes the memory."""
    for _ in range(8):
        with client_at(server, "growing") as child:
            child.hear()
            time.sleep(random.random() / 20)
            child.kill()
    watch.until_back()


def test_killed_between_any_two_packets(server: RunningServer, watch: Watch) -> None:
    for _ in range(20):
        with killable(call_and_call, server.url) as child:
            child.hear()
            time.sleep(random.random() / 50)
            child.kill()
    watch.until_back()


def test_killed_after_it_has_closed(server: RunningServer, watch: Watch) -> None:
    with client_at(server, "closing") as child:
        child.hear()
        child.kill()
        watch.until_back()


def test_killed_while_its_request_waits(server: RunningServer, watch: Watch) -> None:
    """The request is taken out of the line; what runs meanwhile is another's."""
    cancelled = watch.counters("slow").requests_cancelled
    with Client(server.url, transport="grpc") as other:
        running = other.submit("slow", {"x": np.ones(1, np.float32), "turns": LONG_RUN_TURNS})
        until(lambda: watch.counters("slow").running == 1)
        with client_at(server, "called_slowly") as child:
            child.hear()
            until(lambda: watch.counters("slow").queued == 1)
            child.kill()
            until(lambda: watch.counters("slow").requests_cancelled == cancelled + 1)
            until(lambda: not watch.others())
        assert not running.done(), "nobody had to wait for the run"
        assert running.result()["y"].shape == (1,)


def test_killed_while_its_request_runs(server: RunningServer, watch: Watch) -> None:
    """The run finishes on the client's memory, which is there until then."""
    with client_at(server, "called_for_long") as child:
        child.hear()
        until(lambda: watch.counters("slow").running == 1)
        pid = child.pid
        child.kill()
        until(lambda: watch.has(pid, lambda s: s.state == SESSION_STATE_DRAINING))
        assert watch.of_pid(pid).input_bytes == LARGE.nbytes
        watch.until_back()


@pytest.mark.parametrize("step", ["forked", "forked_client"])
def test_a_forked_child_does_not_keep_the_session(
    server: RunningServer, watch: Watch, step: str
) -> None:
    with client_at(server, step) as child:
        grandchild = child.hear()
        try:
            assert watch.of_pid(child.pid).leases >= 1
            child.kill()
            watch.until_back()
            os.kill(grandchild, 0)  # lives
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_many_are_killed_at_once(server: RunningServer, watch: Watch) -> None:
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(client_at(server, "leased")) for _ in range(12)]
        for child in children:
            child.hear()
        assert len(watch.others()) == 12
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        watch.until_back()
