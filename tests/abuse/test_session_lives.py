# SPDX-License-Identifier: Apache-2.0
"""The life of sessions against a live server: whatever their clients do, in any order, the server
says of each what it must be. Clients are processes here, which are killed as well.
"""

import socket
from dataclasses import dataclass, field
from typing import ClassVar

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

from support.holdings import Watch
from support.killable import Anchor, until
from support.lane_peer import LanePeer, Request, by_ref, infer
from support.neighbours import Neighbour
from thirdrail.v1 import lane_pb2
from thirdrail.v1.sessions_pb2 import (
    SESSION_STATE_ACTIVE,
    SESSION_STATE_ATTACHED,
    SESSION_STATE_QUARANTINE,
    SessionInfo,
)
from thirdrail.v1.tensor_pb2 import ArenaRef

LARGE = np.arange(1 << 16, dtype=np.float32)  # 256 KiB
CHUNK_BYTES = 1 << 20
CLIENTS_MAX = 5


@dataclass(eq=False)
class Client:
    """What the server must say of one that lives."""

    anchor: Anchor
    peer: LanePeer
    state: int = SESSION_STATE_ATTACHED
    calls: int = 0
    exports: int = 0
    memory: ArenaRef | None = None
    leases: list[ArenaRef] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.peer.attachment.session

    @property
    def has_memory(self) -> bool:
        return self.memory is not None

    def fits(self, info: SessionInfo) -> bool:
        if (info.state, info.pid) != (self.state, self.anchor.pid):
            return False
        if self.state == SESSION_STATE_QUARANTINE:
            return (info.leases, info.calls_in_flight) == (0, 0) and info.input_bytes > 0
        said = (info.leases, info.calls, info.exports, info.calls_in_flight)
        return said == (len(self.leases), self.calls, self.exports, 0)

    def kill(self) -> None:
        self.anchor.kill()
        self.anchor.pipe.close()
        self.anchor.sock.close()


class LivesMachine(RuleBasedStateMachine):
    watch: ClassVar[Watch]
    neighbour: ClassVar[Neighbour]
    clients: Bundle[Client] = Bundle("clients")

    @initialize()
    def begin(self) -> None:
        self.there: list[Client] = []
        self.lonely: list[Client] = []  # without a session

    # Clients come

    @precondition(lambda self: len(self.there) < CLIENTS_MAX)
    @rule(target=clients)
    def attach(self) -> Client:
        opened = self.watch.opened()
        anchor = Anchor(opened.socket_path)
        peer = LanePeer(anchor.sock)
        peer.attach(token=opened.token)
        client = Client(anchor, peer)
        assert client.number == opened.session
        self.there.append(client)
        return client

    @rule()
    def connect_and_leave(self) -> None:
        anchor = Anchor(self.watch.opened().socket_path)
        anchor.kill()
        anchor.pipe.close()
        anchor.sock.close()

    # They use the server

    @rule(client=clients)
    def call(self, client: Client) -> None:
        assert not client.peer.answer(infer(1, "identity")).status.reason
        client.calls += 1
        client.state = SESSION_STATE_ACTIVE

    @rule(client=clients)
    def call_by_reference(self, client: Client) -> None:
        if client.memory is None:
            client.memory = client.peer.place(client.peer.grow(CHUNK_BYTES), LARGE)
        answer = client.peer.answer(by_ref(1, client.memory, "identity"))
        client.leases.append(answer.outputs[0].ref)
        client.calls += 1
        client.state = SESSION_STATE_ACTIVE

    @rule(client=clients, data=st.data())
    def release(self, client: Client, data: st.DataObject) -> None:
        if client.leases:
            index = data.draw(st.integers(0, len(client.leases) - 1))
            client.peer.release(client.leases.pop(index))

    @rule(client=clients, other=clients)
    def release_what_is_anothers(self, client: Client, other: Client) -> None:
        if other is not client and other.leases:
            client.peer.release(*other.leases)

    # They go

    @rule(client=consumes(clients))
    def close(self, client: Client) -> None:
        client.peer.send(Request(close=lane_pb2.Close()))
        self.leave(client)

    @rule(client=consumes(clients))
    def be_killed(self, client: Client) -> None:
        self.leave(client)

    @rule(client=consumes(clients), is_rude=st.booleans())
    def hang_up(self, client: Client, is_rude: bool) -> None:
        """Without memory it is gone; with some, its process could be reading."""
        if is_rude:
            client.peer.sock.send(b"\xff")
            assert "is not a LaneRequest" in client.peer.goodbye().message
        else:
            client.peer.sock.shutdown(socket.SHUT_RDWR)
        if client.has_memory:
            client.state = SESSION_STATE_QUARANTINE
        else:
            self.there.remove(client)
            self.lonely.append(client)

    def leave(self, client: Client) -> None:
        client.kill()
        self.there.remove(client)

    # What must be

    @invariant()
    def the_server_says_so(self) -> None:
        expected = {each.number: each for each in getattr(self, "there", ())}

        def is_so() -> bool:
            listed = {each.session: each for each in self.watch.others()}
            return listed.keys() == expected.keys() and all(
                expected[number].fits(info) for number, info in listed.items()
            )

        until(is_so, lambda: (self.watch.others(), list(expected.values())))

    @invariant()
    def results_stay_as_they_are(self) -> None:
        for client in getattr(self, "there", ()):
            for ref in client.leases:
                assert np.array_equal(client.peer.read(ref), LARGE)

    def teardown(self) -> None:
        for client in (*getattr(self, "there", ()), *getattr(self, "lonely", ())):
            client.kill()
        self.watch.until_back()
        self.neighbour.has_gone_on()


def run(watch: Watch, neighbour: Neighbour, examples: int) -> None:
    class Machine(LivesMachine):
        pass

    Machine.watch, Machine.neighbour = watch, neighbour
    checks = settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=checks)


def test_sessions_in_any_order(watch: Watch, neighbour: Neighbour) -> None:
    run(watch, neighbour, 12)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_more_sessions_in_any_order(watch: Watch, neighbour: Neighbour) -> None:
    run(watch, neighbour, 300)
