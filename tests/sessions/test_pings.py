# SPDX-License-Identifier: Apache-2.0
"""Pings, the debug feature, and huge pages where there are none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.lane_peer import LanePeer, Request, by_ref, infer
from support.worker import RunningWorker, running_worker
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits, SessionLimits, WorkerConfig

MIB = 1 << 20
POISON = 0xDB


@pytest.fixture(scope="module")
def worker(
    standard_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    path = tmp_path_factory.mktemp("lane") / "cpu.lane"
    config = WorkerConfig(lane=LaneLimits(output_arena_bytes_max=4 * MIB))
    with running_worker(config, listen=path) as running:
        running.load(standard_repository, "identity_fp32")
        yield running


@pytest.fixture
def peer(worker: RunningWorker) -> Iterator[LanePeer]:
    attached = worker.peer()
    yield attached
    attached.send(Request(close=lane_pb2.Close()))
    attached.close()


def ping(peer: LanePeer, number: int, ref: tensor_pb2.ArenaRef | None = None) -> lane_pb2.Pong:
    peer.send(Request(ping=lane_pb2.Ping(request=number, ref=ref)))
    while (response := peer.receive()).WhichOneof("message") == "chunk":
        pass
    return response.pong


def test_a_ping_is_answered_with_its_number(peer: LanePeer) -> None:
    assert ping(peer, 7) == lane_pb2.Pong(request=7)
    assert ping(peer, 1 << 63) == lane_pb2.Pong(request=1 << 63)


@pytest.mark.parametrize("size", [1, 4096, 128 << 10, MIB])
def test_a_ping_with_memory_is_answered_with_a_copy(peer: LanePeer, size: int) -> None:
    data = np.arange(size, dtype=np.uint8)
    place = peer.place(peer.grow(size), data)
    pong = ping(peer, 1, place)
    assert pong.ref.epoch == peer.attachment.output_epoch
    assert peer.read_bytes(pong.ref) == data.tobytes()
    peer.release(pong.ref)


def test_pings_are_refused_with_a_reason_and_the_session_goes_on(peer: LanePeer) -> None:
    chunk = peer.grow(8 * MIB)
    foreign = ping(peer, 1, tensor_pb2.ArenaRef(epoch=chunk.epoch + 99, size=1))
    assert foreign.status.reason == pb.REASON_FAILED_PRECONDITION
    place = tensor_pb2.ArenaRef(epoch=chunk.epoch, size=8 * MIB)
    too_large = ping(peer, 2, place)
    assert too_large.status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert (too_large.request, too_large.HasField("ref")) == (2, False)
    place.size = MIB
    requests = [Request(ping=lane_pb2.Ping(request=n, ref=place)) for n in range(3)]
    peer.send(*requests)
    pongs: list[lane_pb2.Pong] = []
    while len(pongs) < 3:
        response = peer.receive()
        if response.WhichOneof("message") == "pong":
            pongs.append(response.pong)
    reasons = {pong.status.reason for pong in pongs}
    assert reasons <= {0, pb.REASON_RESOURCE_EXHAUSTED}
    assert 0 in reasons
    assert not peer.answer(infer(1)).status.reason


# Debug


def held_result(peer: LanePeer) -> tuple[tensor_pb2.ArenaRef, Array]:
    array = np.arange(MIB // 8, dtype=np.float32)
    ref = peer.answer(by_ref(1, peer.place(peer.grow(array.nbytes), array))).outputs[0].ref
    assert np.array_equal(peer.read(ref), array)
    return ref, array


def test_released_results_are_overwritten_where_a_client_asks_for_that(
    worker: RunningWorker,
) -> None:
    peer = worker.peer(features=["teleport", "debug"])
    assert list(peer.attachment.features) == ["debug"]
    ref, _ = held_result(peer)
    peer.release(ref)
    ping(peer, 1)
    assert set(peer.read_bytes(ref)) == {POISON}
    peer.close()


def test_and_stay_as_they_are_where_it_does_not(peer: LanePeer) -> None:
    assert list(peer.attachment.features) == []
    ref, array = held_result(peer)
    peer.release(ref)
    ping(peer, 1)
    assert np.array_equal(peer.read(ref), array)


# Huge pages


def test_without_huge_pages_on_the_host_memory_is_made_of_others_and_that_is_said_once(
    standard_repository: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    config = WorkerConfig(sessions=SessionLimits(huge_pages=True))
    with running_worker(config, listen=tmp_path / "cpu.lane", log=log) as worker:
        worker.load(standard_repository, "identity_fp32")
        for _ in range(2):
            peer = worker.peer()
            held_result(peer)
            peer.grow(2 * MIB)
            peer.send(Request(close=lane_pb2.Close()))
            peer.close()
    said = [line for line in log.read_text().splitlines() if "huge pages" in line]
    free = [
        line for line in Path("/proc/meminfo").read_text().splitlines() if "HugePages_F" in line
    ]
    if free and int(free[0].split()[1]) == 0:
        (line,) = said
        assert line.endswith(
            "huge pages: the host has none left (Cannot allocate memory): ordinary pages"
        )
    else:
        assert "pages of 2 MiB" in said[0]
