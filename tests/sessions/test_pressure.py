# SPDX-License-Identifier: Apache-2.0
"""Memory is short: who gets some, who is refused, who is ended, and what they are told."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support.lane_peer import LanePeer, Request, by_ref, infer
from support.worker import RunningWorker, running_worker
from thirdrail.errors import ThirdrailError
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import SessionLimits, WorkerConfig
from thirdrail_server.worker.arena_ledger import ArenaLedger
from thirdrail_server.worker.chunks import Budget

MIB = 1 << 20
TOTAL = 8 * MIB


@pytest.fixture
def worker(standard_repository: Path, tmp_path: Path) -> Iterator[RunningWorker]:
    limits = SessionLimits(arena_bytes_total_max=TOTAL, arena_bytes_per_uid_max=TOTAL)
    with running_worker(WorkerConfig(sessions=limits), listen=tmp_path / "cpu.lane") as running:
        running.load(standard_repository, "identity_fp32")
        yield running


@contextlib.contextmanager
def clients(worker: RunningWorker, *names: str) -> Iterator[list[LanePeer]]:
    peers = [worker.peer(client_name=name) for name in names]
    yield peers
    for peer in peers:
        peer.close()


def grow(peer: LanePeer, size: int) -> lane_pb2.LaneResponse:
    peer.send(Request(grow=lane_pb2.GrowRequest(size=size)))
    return peer.receive()


def test_one_client_alone_may_have_all_and_no_more(worker: RunningWorker) -> None:
    with clients(worker, "alone") as (alone,):
        assert grow(alone, TOTAL).chunk.size == TOTAL
        refused = grow(alone, 1).grow_refused
        assert refused.size == 1
        assert refused.message.startswith("4096 more bytes of shared memory were asked for; uid ")
        assert refused.message.endswith(
            f"may have {TOTAL} and have {TOTAL}, most of it session {alone.attachment.session} "
            f"({owner_of(worker, alone)}, 'alone'): {TOTAL}"
        )


def owner_of(worker: RunningWorker, peer: LanePeer) -> str:
    info = worker.sessions()[peer.attachment.session]
    return f"pid {info.pid}, uid {info.uid}"


def test_the_greedy_one_ends_for_the_needy_one_who_gets_its_memory(worker: RunningWorker) -> None:
    with clients(worker, "greedy", "needy") as (greedy, needy):
        grow(greedy, TOTAL)
        owner = owner_of(worker, greedy)
        needy.send(Request(grow=lane_pb2.GrowRequest(size=MIB)))
        status = greedy.goodbye()
        # It lets go, and who waits for that, for a second at most, gets it.
        greedy.send(Request(close=lane_pb2.Close()))
        assert needy.receive().chunk.size == MIB
        assert status.reason == pb.REASON_RESOURCE_EXHAUSTED
        assert status.message == (
            f"session {greedy.attachment.session} ({owner}, 'greedy') ends: it held {TOTAL} bytes "
            f"of shared memory, more than its fair share of {TOTAL // 2}, and another session "
            f"needed {MIB}"
        )


def test_one_who_does_not_let_go_keeps_his_memory_and_the_needy_one_is_told_so(
    worker: RunningWorker,
) -> None:
    with clients(worker, "greedy", "needy") as (greedy, needy):
        grow(greedy, TOTAL)
        refused = grow(needy, MIB).grow_refused
        assert f"{TOTAL} are of sessions that have ended and whose clients still" in refused.message
        assert "'greedy'" in refused.message
        greedy.goodbye()
        assert worker.status().input_bytes == TOTAL
        greedy.send(Request(close=lane_pb2.Close()))
        assert grow(needy, MIB).chunk.size == MIB


def test_a_greedy_one_ends_nobody(worker: RunningWorker) -> None:
    with clients(worker, "first", "second") as (first, second):
        grow(first, TOTAL)
        assert "most of it session" in grow(second, TOTAL // 2 + 1).grow_refused.message
        assert not first.answer(infer(1)).status.reason


def test_a_result_finds_no_memory_because_of_another_who_is_named(worker: RunningWorker) -> None:
    large = np.arange(MIB // 4, dtype=np.float32)
    with clients(worker, "greedy", "needy") as (greedy, needy):
        place = needy.place(needy.grow(MIB), large)
        grow(greedy, TOTAL - MIB)
        status = needy.answer(by_ref(1, place)).status
        assert status.reason == pb.REASON_RESOURCE_EXHAUSTED
        assert "'greedy') held" in status.message
        assert status.message.endswith("was ended to make room; try again")
        assert greedy.goodbye().reason == pb.REASON_RESOURCE_EXHAUSTED
        greedy.send(Request(close=lane_pb2.Close()))
        while greedy.attachment.session in worker.sessions():
            pass
        response = needy.answer(by_ref(2, place))
        assert np.array_equal(needy.read(response.outputs[0].ref), large)


def test_the_fronts_lane_is_exempt(worker: RunningWorker) -> None:
    front = LanePeer(worker.sockets.pop())
    front.attach()
    with clients(worker, "other") as (other,):
        assert grow(front, 2 * TOTAL).chunk.size == 2 * TOTAL
        assert grow(other, TOTAL).chunk.size == TOTAL
        assert grow(front, MIB).WhichOneof("message") == "chunk"
    front.close()


async def test_nobody_ends_for_memory_that_is_only_good_to_have() -> None:
    """Arenas grow by more than what is needed, as long as there is room."""
    ledger = ArenaLedger(SessionLimits(arena_bytes_total_max=100 * MIB))
    greedy, needy = (ledger.open(SomeSession(number)) for number in (1, 2))
    greedy.charge(70 * MIB)
    needy.charge(25 * MIB)
    budget = Budget(100 * MIB, needy.charge)
    assert budget.take_chunk(5 * MIB) == 5 * MIB  # 8 would have been better
    assert budget.used_bytes == 5 * MIB
    assert not greedy.has_ended


@dataclass
class SomeSession:
    number: int
    uid: int = 1000

    def goodbye(self, error: ThirdrailError) -> None:
        pytest.fail(f"session {self.number} ended: {error}")
