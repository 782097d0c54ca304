# SPDX-License-Identifier: Apache-2.0
"""Tokens: each good for one hello, for a short time, of one worker; and nothing else is good."""

import time
from collections.abc import Iterator

import pytest

from support.killable import until
from support.lane_peer import LanePeer, connect, hello, infer
from support.worker import RunningWorker, running_worker
from thirdrail.errors import PermissionDenied
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.config import SessionLimits, WorkerConfig
from thirdrail_server.worker.tokens import TOKEN_BYTES, TokenTable

MS = 1_000_000
LIFE_MS = 400


def counting() -> TokenTable:
    """Two may wait, each for 100 ms; secrets are told apart by their first byte."""
    made = iter(range(1, 256))
    return TokenTable(2, 100, lambda size: bytes([next(made)]) * size)


def test_a_token_is_good_once() -> None:
    tokens = counting()
    token = tokens.issue(7, 0)
    assert len(token) == TOKEN_BYTES
    assert tokens.redeem(token, 5).session == 7
    with pytest.raises(PermissionDenied):
        tokens.redeem(token, 6)


def test_a_token_is_good_until_its_time_is_over() -> None:
    tokens = counting()
    first, second = tokens.issue(1, 0), tokens.issue(2, 0)
    assert tokens.redeem(first, 100 * MS).session == 1
    with pytest.raises(PermissionDenied):
        tokens.redeem(second, 100 * MS + 1)
    assert tokens.pending(101 * MS) == []


def test_tokens_that_wait_are_bounded_and_the_oldest_makes_room() -> None:
    tokens = counting()
    first = tokens.issue(1, 0)
    tokens.issue(2, 60 * MS)
    third = tokens.issue(3, 90 * MS)
    assert [each.session for each in tokens.pending(90 * MS)] == [2, 3]
    with pytest.raises(PermissionDenied, match="only the newest 2 wait"):
        tokens.redeem(first, 90 * MS)
    assert tokens.redeem(third, 90 * MS).session == 3


@pytest.mark.parametrize("token", [b"", b"\1", b"\1" * 15, b"\1" * 17, b"\2" * 16, b"\xff" * 999])
def test_what_is_no_token_uses_none_up(token: bytes) -> None:
    tokens = counting()
    good = tokens.issue(1, 0)
    with pytest.raises(PermissionDenied, match="within 100 ms of OpenSession"):
        tokens.redeem(token, 1)
    assert tokens.redeem(good, 1).session == 1


# With a worker


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningWorker]]:
    """One whose tokens live shortly, and one for those who use theirs, however busy the machine."""
    folder = tmp_path_factory.mktemp("lanes")
    short = SessionLimits(token_life_ms=LIFE_MS)
    long = SessionLimits(token_life_ms=60_000, tokens_pending_max=5)
    with (
        running_worker(WorkerConfig(sessions=short), listen=folder / "a.lane") as a,
        running_worker(WorkerConfig(sessions=long), listen=folder / "b.lane") as b,
    ):
        yield [a, b]


def refusal_of(worker: RunningWorker, token: bytes) -> pb.Status:
    assert worker.lane_path is not None
    peer = LanePeer(connect(worker.lane_path))
    peer.send(hello(token=token))
    status = peer.goodbye()
    peer.close()
    return status


def refusals(worker: RunningWorker) -> dict[str, int]:
    return {each.reason: each.clients for each in worker.status().attach_refusals}


def test_nobody_attaches_without_a_good_token(workers: list[RunningWorker]) -> None:
    worker, other = workers
    foreign = other.open_session().token
    stale = worker.open_session().token
    time.sleep(LIFE_MS / 1000 + 0.05)
    before = refusals(worker).get("PERMISSION_DENIED", 0)
    for token in (b"", b"x" * 16, b"x" * 1000, foreign, stale):
        status = refusal_of(worker, token)
        assert status.reason == pb.REASON_PERMISSION_DENIED
        assert f"each is good for one hello, within {LIFE_MS} ms" in status.message
        assert token.hex() not in status.message or not token
    assert refusals(worker)["PERMISSION_DENIED"] == before + 5
    until(lambda: worker.status().sessions == 1)  # only the front's lane, which nobody uses


def test_a_token_cannot_be_replayed(workers: list[RunningWorker]) -> None:
    _, worker = workers
    assert worker.lane_path is not None
    token = worker.open_session().token
    peer = LanePeer(connect(worker.lane_path))
    peer.attach(token=token)
    assert refusal_of(worker, token).reason == pb.REASON_PERMISSION_DENIED
    peer.answer(infer(1))  # the first one is not disturbed
    peer.close()
    assert refusal_of(worker, token).reason == pb.REASON_PERMISSION_DENIED


def test_a_connection_without_a_hello_has_no_right_to_anything(
    workers: list[RunningWorker],
) -> None:
    _, worker = workers
    assert worker.lane_path is not None
    peer = LanePeer(connect(worker.lane_path))
    peer.send(infer(1))
    assert peer.goodbye().message == "the first message must be a hello, got infer"
    peer.close()


def test_whoever_opens_many_sessions_keeps_nobody_out(workers: list[RunningWorker]) -> None:
    _, worker = workers
    oldest, *_ = [worker.open_session().token for _ in range(6)]
    assert refusal_of(worker, oldest).reason == pb.REASON_PERMISSION_DENIED
    worker.peer().close()
