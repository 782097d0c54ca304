# SPDX-License-Identifier: Apache-2.0
"""Several sessions at a time that send packets of any kind, in any order, to a live server."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.anchored import Anchored
from support.handover_peer import HandOverPeer
from support.holdings import Watch
from support.killable import until
from support.lane_peer import LanePeer, Request, by_ref, infer
from support.neighbours import Neighbour
from support.random_packets import packets
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail.v1.tensor_pb2 import ArenaRef

LARGE = np.arange(1 << 15, dtype=np.float32)
SESSIONS = 3
STEPS_MAX = 12
LAST_CALL = 777

# What to send, whose reference to use, and the field of it that is changed, by how much.
Near = tuple[str, int, tuple[str, int] | None]


@dataclass
class Talker:
    """A session and what it was given. It never reads before the end."""

    peer: LanePeer
    refs: list[ArenaRef] = field(default_factory=list)
    is_over: bool = False

    def send(self, packet: bytes) -> None:
        try:
            self.peer.sock.send(packet)
        except ConnectionError:
            self.is_over = True

    def is_served(self) -> bool:
        """Whether a valid call is answered after all that; else there was a goodbye, or an end."""
        self.send(infer(LAST_CALL, "identity").SerializeToString())
        try:
            while not self.is_over:
                response = self.peer.receive()
                kind = response.WhichOneof("message")
                if kind == "infer" and response.infer.call == LAST_CALL:
                    return True
                if kind == "goodbye":
                    assert response.goodbye.status.reason
                    assert response.goodbye.status.message
        except EOFError:
            pass
        return False


# Packets that are valid but for one thing, made of what all sessions were given: an index says
# whose reference is taken.
fields = st.sampled_from(["epoch", "chunk", "offset", "size", "slot", "generation"])
changes = st.integers(-2, 2) | st.sampled_from([64, -64, 1 << 20, 1 << 31, 1 << 63])
near = st.tuples(
    st.sampled_from(["infer", "release", "ping", "export", "drop", "slow"]),
    st.integers(0, SESSIONS * 3 - 1),
    st.none() | st.tuples(fields, changes),
)
steps = st.lists(
    st.tuples(st.integers(0, SESSIONS - 1), packets | near), min_size=1, max_size=STEPS_MAX
)


def packet_of(kind: str, ref: ArenaRef, change: tuple[str, int] | None) -> bytes:
    used = ArenaRef()
    used.CopyFrom(ref)
    if change is not None:
        name, by = change
        bits = 64 if name in ("offset", "size") else 32
        setattr(used, name, (getattr(used, name) + by) % (1 << bits))
    lease = lane_pb2.Lease(epoch=used.epoch, slot=used.slot, generation=used.generation)
    export = lane_pb2.ExportRequest(
        request=1, ref=used, data_type=tensor_pb2.DATA_TYPE_FP32, shape=LARGE.shape
    )
    requests = {
        "infer": lambda: by_ref(1, used, "identity"),
        "slow": lambda: by_ref(2, used, "slow"),  # an input is missing
        "release": lambda: Request(releases=[lease, lease]),
        "ping": lambda: Request(ping=lane_pb2.Ping(request=1, ref=used)),
        "export": lambda: Request(export_tensor=export),
        "drop": lambda: Request(drop=lane_pb2.DropRequest(epoch=used.epoch, chunk=used.chunk)),
    }
    return requests[kind]().SerializeToString()


def talker(anchored: Anchored) -> Talker:
    """With a tensor in the input arena, one alone, and a leased result."""
    peer = HandOverPeer.adopt(anchored.attach())
    shared = peer.place(peer.grow(LARGE.nbytes), LARGE)
    result = peer.answer(by_ref(1, shared, "identity")).outputs[0].ref
    return Talker(peer, [shared, peer.alone(LARGE), result])


def throw(anchored: Anchored, watch: Watch, neighbour: Neighbour, count: int) -> list[int]:
    """So many groups of sessions. How many packets there were, and sessions that went on."""
    totals = [0, 0]

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps)
    def one_group(sequence: list[tuple[int, bytes | Near]]) -> None:
        talkers = [talker(anchored) for _ in range(SESSIONS)]
        refs = [ref for each in talkers for ref in each.refs]
        for number, step in sequence:
            packet = step if isinstance(step, bytes) else packet_of(step[0], refs[step[1]], step[2])
            talkers[number].send(packet)
        for number, each in enumerate(talkers):
            is_served = each.is_served()
            assert is_served or number in {who for who, _ in sequence}, "it has sent nothing"
            totals[1] += is_served
        totals[0] += len(sequence)
        anchored.kill()
        watch.until_back()

    one_group()
    neighbour.has_gone_on()
    return totals


def test_random_packets(anchored: Anchored, watch: Watch, neighbour: Neighbour) -> None:
    sent, served = throw(anchored, watch, neighbour, 40)
    assert sent > 40
    assert served > 40


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_more_random_packets(anchored: Anchored, watch: Watch, neighbour: Neighbour) -> None:
    sent, served = throw(anchored, watch, neighbour, 1500)
    print(f"{sent} packets, {served} sessions went on")
    # A request that never ended would be counted for good; the neighbour's calls come and go.
    until(lambda: watch.counters("identity").running == 0)
