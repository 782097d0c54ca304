# SPDX-License-Identifier: Apache-2.0
"""The life of a session: the table by itself, and a real worker's sessions in any order."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.killable import until
from support.lane_peer import LanePeer, Request, X, by_ref, infer
from support.worker import RunningWorker, running_worker
from thirdrail.v1 import lane_pb2
from thirdrail.v1.sessions_pb2 import SessionState
from thirdrail_server.config import LaneLimits, SessionLimits, WorkerConfig
from thirdrail_server.worker.session_states import OPEN, Event, Life, State

ORDER = list(State)
LARGE = np.arange(1 << 16, dtype=np.float32)  # 256 KiB: never inline


def test_the_states_have_the_protocols_numbers() -> None:
    for state in State:
        assert SessionState.Name(state.value) == f"SESSION_STATE_{state.name}"
    assert len(State) == len(SessionState.keys()) - 1


class LifeMachine(RuleBasedStateMachine):
    """What may come, comes; what may not is our own mistake, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.life = Life()
        self.seen = [State.OPENING]
        self.came: set[Event] = set()

    @rule(event=st.sampled_from(list(Event)))
    def event(self, event: Event) -> None:
        before = self.life.state
        may_come = {
            Event.HELLO: before is State.OPENING,
            Event.USE: before in (State.ATTACHED, State.ACTIVE),
            Event.IDLE: before is State.DRAINING,
            Event.END: True,
            Event.LET_GO: True,
        }[event]
        if not may_come:
            with pytest.raises(ValueError, match=f"{event.name} cannot come in {before.name}"):
                self.life.on(event)
            assert self.life.state is before
            return
        self.came.add(event)
        assert self.life.on(event) is self.life.state
        self.seen.append(self.life.state)

    @invariant()
    def it_never_goes_back(self) -> None:
        places = [ORDER.index(state) for state in self.seen]
        assert places == sorted(places)

    @invariant()
    def it_is_open_until_its_end(self) -> None:
        assert self.life.is_open == (Event.END not in self.came)
        assert self.life.is_open == (self.life.state in OPEN)

    @invariant()
    def memory_is_freed_only_when_nobody_uses_it(self) -> None:
        everybody = {Event.END, Event.IDLE, Event.LET_GO}
        assert (self.life.state is State.FREED) == (everybody <= self.came)


TestLife = LifeMachine.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)


# A real worker's sessions


@contextlib.contextmanager
def small_worker(repository: Path, folder: Path) -> Iterator[RunningWorker]:
    config = WorkerConfig(
        lane=LaneLimits(input_arena_bytes_max=4 << 20, output_arena_bytes_max=4 << 20),
        sessions=SessionLimits(sessions_per_uid_max=5, tokens_pending_max=4),
    )
    with running_worker(config, listen=folder / "cpu.lane") as worker:
        worker.load(repository, "identity_fp32")
        yield worker


class SessionMachine(RuleBasedStateMachine):
    """Clients come, call, hold results, release some and leave, each in one of three ways."""

    worker: RunningWorker
    peers: Bundle[LanePeer] = Bundle("peers")

    @initialize()
    def begin(self) -> None:
        self.live: list[LanePeer] = []
        self.held: dict[LanePeer, list[Any]] = {}
        self.memory: dict[LanePeer, lane_pb2.Chunk] = {}
        self.calls = 0

    @precondition(lambda self: len(self.live) < 5)
    @rule(target=peers)
    def attach(self) -> LanePeer:
        # Whoever has hung up counts until the worker has noticed.
        until(lambda: len(self.worker.sessions()) <= len(self.live), self.worker.sessions)
        peer = self.worker.peer()
        self.live.append(peer)
        self.held[peer] = []
        return peer

    @rule(peer=peers)
    def call_inline(self, peer: LanePeer) -> None:
        self.calls += 1
        assert peer.answer(infer(self.calls)).outputs[0].raw == X.tobytes()

    @rule(peer=peers)
    def call_by_reference(self, peer: LanePeer) -> None:
        if peer not in self.memory:
            self.memory[peer] = peer.grow(LARGE.nbytes)
        self.calls += 1
        answer = peer.answer(by_ref(self.calls, peer.place(self.memory[peer], LARGE + self.calls)))
        if len(self.held[peer]) < 10:
            assert np.array_equal(peer.read(answer.outputs[0].ref), LARGE + self.calls)
        if not answer.status.reason:
            self.held[peer].append((answer.outputs[0].ref, self.calls))

    @rule(peer=peers, data=st.data())
    def hand_on(self, peer: LanePeer, data: st.DataObject) -> None:
        """A result is the next call's input, where it lies."""
        if not self.held[peer]:
            return
        ref, number = data.draw(st.sampled_from(self.held[peer]))
        self.calls += 1
        answer = peer.answer(by_ref(self.calls, ref))
        if not answer.status.reason:
            self.held[peer].append((answer.outputs[0].ref, number))

    @rule(peer=peers, data=st.data(), twice=st.booleans())
    def release(self, peer: LanePeer, data: st.DataObject, twice: bool) -> None:
        if not self.held[peer]:
            return
        index = data.draw(st.integers(0, len(self.held[peer]) - 1))
        ref, _ = self.held[peer].pop(index)
        peer.release(*[ref] * (1 + twice))

    @rule(peer=consumes(peers))
    def say_goodbye(self, peer: LanePeer) -> None:
        peer.send(Request(close=lane_pb2.Close()))
        self.leave(peer)

    @rule(peer=consumes(peers))
    def break_a_rule(self, peer: LanePeer) -> None:
        peer.sock.send(b"\xff")
        peer.goodbye()
        with contextlib.suppress(ConnectionError):  # nobody waits for it, without memory
            peer.send(Request(close=lane_pb2.Close()))
        self.leave(peer)

    @rule(peer=consumes(peers))
    def close_before_the_answer(self, peer: LanePeer) -> None:
        peer.send(infer(1 << 40), Request(close=lane_pb2.Close()))
        self.leave(peer)

    def leave(self, peer: LanePeer) -> None:
        with contextlib.suppress(EOFError):
            while True:
                peer.receive()
        peer.close()
        self.live.remove(peer)
        del self.held[peer]
        self.memory.pop(peer, None)

    @invariant()
    def everybody_reads_what_he_was_given(self) -> None:
        for peer in getattr(self, "live", ()):
            for ref, number in self.held[peer]:
                assert np.array_equal(peer.read(ref), LARGE + number)

    def teardown(self) -> None:
        for peer in list(getattr(self, "live", ())):
            peer.send(Request(close=lane_pb2.Close()))
            self.leave(peer)
        listed = self.worker.sessions()
        assert all(each.state >= State.DRAINING.value for each in listed.values())


def test_sessions_in_any_order(standard_repository: Path, tmp_path: Path) -> None:
    with small_worker(standard_repository, tmp_path) as worker:

        class Machine(SessionMachine):
            pass

        Machine.worker = worker
        checks = settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Machine, settings=checks)
        while worker.sessions():
            pass
        status = worker.status()
        assert (status.arena_bytes, status.leases, status.sessions) == (0, 0, 1)
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "memfd:thirdrail" not in maps
        assert os.path.exists(f"/proc/{worker.process.pid}")
