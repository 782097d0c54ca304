# SPDX-License-Identifier: Apache-2.0
"""Waiting on a lane for what no packet brings: room that another thread gives back.

The peer is scripted, so that the lane is as full as a test wants it.
"""

import asyncio
import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.lane_reading import OPTIONS
from support.lanes import ScriptedPeer
from thirdrail import errors
from thirdrail.lane import blocking, packets
from thirdrail.lane.aio_session import AsyncSession
from thirdrail.lane.lane_stream import LaneStream
from thirdrail.lane.memory import create_chunk
from thirdrail.lane.places import Place
from thirdrail.lane.turns import Notice
from thirdrail.transport import CannotAttach
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2

WAIT_S = 20
PAGE = 4096
SMALL = {"x": np.zeros(4, np.float32)}


class NarrowPeer(ScriptedPeer):
    """One call at a time, and one page of input memory; nothing travels in the packet."""

    LIMITS = lane_pb2.Limits(
        packet_bytes=1 << 16, calls_in_flight=1, input_arena_bytes=PAGE, output_arena_bytes=PAGE
    )

    def give_chunk(self, *, epoch: int = 1, number: int = 0, alone: bool = False) -> None:
        fd, mapping = create_chunk(PAGE, client_writes=True, alone=alone)
        mapping.close()
        role = lane_pb2.ARENA_ROLE_INPUT
        chunk = lane_pb2.Chunk(role=role, epoch=epoch, chunk=number, size=PAGE, alone=alone)
        packets.send(self.sock, lane_pb2.LaneResponse(chunk=chunk).SerializeToString(), [fd])
        os.close(fd)

    def until_somebody_leads(self) -> None:
        until(lambda: self.caller.lane.talk.turns.is_led)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_notice_reaches_a_leader_that_looks_out() -> None:
    with NarrowPeer() as peer:
        lane, notice = peer.caller.lane, Notice()
        waiting = peer.beside(lambda: lane.wait(notice, None))
        peer.until_somebody_leads()
        lane.wake(notice)
        assert waiting.result(WAIT_S)
        assert not lane.wait(Notice(), time.monotonic() + 0.01), "it is told once"


def test_a_request_that_could_not_be_sent_lets_the_next_one_go() -> None:
    """As many as may are on their way, and the worker takes none of them in time."""
    with NarrowPeer() as peer:
        talk, empty = peer.caller.lane.talk, {"x": np.zeros(0, np.float32)}
        with contextlib.suppress(errors.TimedOut):
            while True:
                talk.send(lane_pb2.LaneRequest(cancel=pb.Cancel(call=99)), 0.0)
        stuck = peer.beside(lambda: peer.caller.infer("m", empty, timeout=0.2))
        until(lambda: talk.calls_in_flight)
        following = peer.beside(lambda: peer.caller.infer("m", empty))
        assert isinstance(stuck.exception(WAIT_S), errors.TimedOut)
        peer.answer(*peer.calls(1))
        assert following.result(WAIT_S)["x"].size == 0


def test_an_array_that_takes_the_last_room_is_told_to_who_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who saw the place taken, and no array over it, waits for a call's end that never comes."""
    with NarrowPeer() as peer:
        placer = peer.caller.lane.talk.placer
        reserve = placer.reserve

        def reserve_and_look_around(*arguments: Any) -> list[Place]:
            places = reserve(*arguments)
            monkeypatch.undo()
            waiting.append(peer.beside(lambda: peer.caller.infer("m", SMALL)))
            peer.until_somebody_leads()
            return places

        waiting: list[Any] = []
        monkeypatch.setattr(placer, "reserve", reserve_and_look_around)
        array = peer.beside(lambda: peer.caller.lane.empty((PAGE,), np.uint8, alone=False))
        assert peer.receive().grow.size == PAGE
        peer.give_chunk()
        assert array.result(WAIT_S).size == PAGE
        error = waiting[0].exception(WAIT_S)
        assert isinstance(error, errors.ResourceExhausted)
        assert "client.empty() hold" in str(error)


class WiderPeer(NarrowPeer):
    LIMITS = lane_pb2.Limits(
        packet_bytes=1 << 16, calls_in_flight=2, input_arena_bytes=2 * PAGE, output_arena_bytes=PAGE
    )


def test_an_array_that_is_gone_is_told_to_who_waits_whoever_finds_that() -> None:
    """Here somebody who gives a result back, while a call goes on that has the rest."""
    page = {"x": np.zeros(PAGE, np.uint8)}
    with WiderPeer() as peer:
        lane = peer.caller.lane
        asked = peer.beside(lambda: lane.empty((PAGE,), np.uint8, alone=False))
        assert peer.receive().grow.size == PAGE
        peer.give_chunk()
        array = asked.result(WAIT_S)
        first = peer.beside(lambda: peer.caller.infer("m", page))
        assert peer.receive().grow.size == PAGE
        peer.give_chunk(number=1)
        peer.calls(1)
        second = peer.beside(lambda: peer.caller.infer("m", page))
        until(lambda: lane.talk.turns.sleepers)
        del array, asked
        until(lambda: lane.talk.memory.shown.has_collected)
        lane._give_back([])
        peer.answer(*peer.calls(1), outputs=[])
        assert not second.result(WAIT_S)
        assert not first.done()


def test_memory_that_comes_too_late_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "EMPTY_TIMEOUT_S", 0.01)
    with NarrowPeer() as peer:
        lane = peer.caller.lane
        with pytest.raises(errors.TimedOut):
            lane.empty((PAGE,), np.uint8, alone=True)
        assert peer.receive().grow.alone
        peer.give_chunk(alone=True)
        lane.poll()
        lane.talk.give_back_unused()
        assert peer.receive().HasField("drop")
        assert lane.talk.memory.input_bytes_used == 0


@pytest.mark.parametrize(("epoch", "number"), [(1, 1), (2, 0), (0, 0)])
def test_a_chunk_out_of_its_turn_ends_the_lane(epoch: int, number: int) -> None:
    with NarrowPeer() as peer:
        future = peer.caller.submit("m", {"x": np.zeros(0, np.float32)})
        peer.give_chunk(epoch=epoch, number=number)
        with pytest.raises(errors.Unavailable, match=f"chunk {number} of epoch {epoch}, expected"):
            future.result(WAIT_S)


@pytest.mark.parametrize("what", ["an answer", "a chunk"])
def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path, what: str) -> None:
    with NarrowPeer() as peer:
        future = peer.caller.submit("m", {"x": np.zeros(0, np.float32)})
        [request] = peer.calls(1)
        if what == "an answer":
            answer = pb.InferResponse(call=request.call, final=True, outputs=request.inputs)
            message = lane_pb2.LaneResponse(infer=answer)
        else:
            message = lane_pb2.LaneResponse(chunk=lane_pb2.Chunk(size=PAGE))
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        packets.send(peer.sock, message.SerializeToString(), [writer, writer])
        os.close(writer)
        error = future.exception(WAIT_S)
        assert (error is None) == (what == "an answer")
        assert os.read(reader, 1) == b"", "its other end is open in nobody"
        os.close(reader)


async def test_descriptors_beside_nonsense_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    opening = asyncio.ensure_future(AsyncSession.open(ours, b"", "test"))
    await asyncio.to_thread(theirs.recv, 1 << 16)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    packets.send(theirs, b"\xff", [writer])
    os.close(writer)
    with pytest.raises(CannotAttach, match="a packet is no LaneResponse"):
        await opening
    assert os.read(reader, 1) == b"", "its other end is open in nobody"
    os.close(reader)
    theirs.close()


def encode(*_: object) -> tuple[bytes, dict[str, Any]]:
    return OPTIONS, SMALL


def test_a_stream_waits_no_longer_than_its_requests_may(peer: ScriptedPeer) -> None:
    """The worker answers nothing, not even that the time is over."""
    with LaneStream(peer.caller.lane, encode, lambda *_: _[-1], in_flight_max=1) as stream:
        first = stream.submit("m", SMALL, timeout=0.1)
        with pytest.raises(errors.TimedOut, match=r"no answer within 0\.05 s"):
            stream.submit("m", SMALL, timeout=0.05)
    assert isinstance(first.exception(0), errors.TimedOut)


def test_errors_that_are_kept_keep_nothing_of_whoever_got_them(peer: ScriptedPeer) -> None:
    with LaneStream(peer.caller.lane, encode, lambda *_: _[-1]) as stream:
        peer.sock.close()
        with pytest.raises(errors.Unavailable):
            peer.caller.infer("m", SMALL)
        depths = []
        for _ in range(3):
            with pytest.raises(errors.Unavailable, match="open another one") as told:
                stream.submit("m", SMALL)
            depths.append(len(list(traceback.walk_tb(told.tb))))
            assert told.value.__notes__
    assert len(set(depths)) == 1
