# SPDX-License-Identifier: Apache-2.0
"""Whoever comes to the lane without a good token, or with too many."""

import os
import threading
import time
from pathlib import Path

import pytest

from support.dying import die_at
from support.holdings import Watch
from support.killable import Anchor, killable, until
from support.lane_peer import LanePeer, connect, hello, infer
from support.server import RunningServer
from thirdrail.v1 import inference_pb2 as pb

OTHER_UID = 12345
RACERS = 8
SILENT = 300  # more than may wait, and more than the listening queue takes

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its uid, which root may")


def refusal(path: str, token: bytes) -> str:
    """What a hello with this token is answered."""
    peer = LanePeer(connect(path))
    peer.send(hello(token=token))
    status = peer.goodbye()
    peer.close()
    assert status.reason == pb.REASON_PERMISSION_DENIED
    return status.message


@pytest.mark.parametrize("token", [b"", b"\0" * 16, b"x", b"x" * 17, b"x" * 60_000])
def test_a_token_that_nobody_issued(watch: Watch, token: bytes) -> None:
    assert "is not one of a session that waits" in refusal(watch.opened().socket_path, token)


def test_a_part_of_a_token(watch: Watch) -> None:
    opened = watch.opened()
    for wrong in (opened.token[:-1], opened.token + b"\0", opened.token[::-1]):
        refusal(opened.socket_path, wrong)
    LanePeer.of(opened).close()  # and the right one is still good


def test_a_token_is_good_once(watch: Watch) -> None:
    opened = watch.opened()
    first = LanePeer.of(opened)
    assert "is not one of a session that waits" in refusal(opened.socket_path, opened.token)
    assert not first.answer(infer(1)).status.reason
    first.close()
    refusal(opened.socket_path, opened.token)


def test_of_several_with_the_same_token_one_gets_in(watch: Watch) -> None:
    opened = watch.opened()
    peers = [LanePeer(connect(opened.socket_path)) for _ in range(RACERS)]
    start = threading.Barrier(RACERS)
    answers: list[str | None] = []

    def race(peer: LanePeer) -> None:
        start.wait()
        peer.send(hello(token=opened.token))
        answers.append(peer.receive().WhichOneof("message"))

    racers = [threading.Thread(target=race, args=(peer,)) for peer in peers]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(map(str, answers)) == ["attached"] + ["goodbye"] * (RACERS - 1)
    for peer in peers:
        peer.close()


@pytest.mark.slow
def test_tokens_and_clients_that_wait_too_long(server: RunningServer, watch: Watch) -> None:
    """A token's client is killed, another never uses his; one connects and says nothing."""
    opened = watch.opened()
    with killable(die_at, server.url, "token_issued") as child:
        child.hear()
        child.kill()
    assert watch.tokens() >= 2
    silent = LanePeer(connect(opened.socket_path))
    assert silent.goodbye().message == "no hello came within 5000 ms"
    until(lambda: watch.tokens() == 0)
    refusal(opened.socket_path, opened.token)
    silent.close()


def test_clients_that_say_nothing_do_not_keep_others_out(watch: Watch) -> None:
    path = watch.opened().socket_path
    silent = []
    for _ in range(SILENT):
        silent.append(connect(path))
        if len(silent) % 50 == 0:
            honest = LanePeer.of(watch.opened())
            assert not honest.answer(infer(1)).status.reason
            honest.close()
    first = LanePeer(silent[0])
    assert first.goodbye().message == "too many clients have not said hello"
    assert watch.holdings().sessions <= watch.before.sessions + 64
    for sock in silent:
        sock.close()


def test_a_flood_of_tokens_does_not_keep_others_out(watch: Watch) -> None:
    """Of too many tokens that nobody uses, the oldest are forgotten."""
    stopping = threading.Event()

    def flood() -> None:
        while not stopping.is_set():
            watch.opened()

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        until(lambda: watch.tokens() >= 60)
        for _ in range(20):
            honest = LanePeer.of(watch.opened())
            assert not honest.answer(infer(1)).status.reason
            honest.close()
            time.sleep(0.01)
    finally:
        stopping.set()
        flooding.join()


@needs_root
def test_another_user_is_not_let_in(watch: Watch) -> None:
    """With a good token, and where the file's mode would let him: the worker asks the kernel."""
    opened = watch.opened()
    path = Path(opened.socket_path)
    modes = [(each, each.stat().st_mode & 0o777) for each in (path, path.parent)]
    try:
        for each, _ in modes:
            each.chmod(0o777)
        anchor = Anchor(opened.socket_path, OTHER_UID)
    finally:
        for each, mode in modes:
            each.chmod(mode)
    status = LanePeer(anchor.sock).goodbye()
    assert status.reason == pb.REASON_PERMISSION_DENIED
    assert f"uid {OTHER_UID} may not attach" in status.message
    anchor.kill()
    anchor.sock.close()
    LanePeer.of(opened).close()  # the token was not spent on him


@needs_root
def test_another_user_does_not_get_as_far_as_that(watch: Watch) -> None:
    with pytest.raises(EOFError):  # not allowed to connect, he has ended
        Anchor(watch.opened().socket_path, OTHER_UID)
