# SPDX-License-Identifier: Apache-2.0
"""How a lane ends for who reads it: a worker that dies, says goodbye or makes no sense; `close`."""

from concurrent.futures import Future

import pytest

from support.killable import until
from support.lane_reading import WAIT_S, until_no_watcher, value
from support.lanes import ScriptedPeer
from support.open_files import open_files, opened_since
from thirdrail import errors
from thirdrail.lane.calls import NotSent
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2


def test_everybody_wakes_when_the_worker_dies(peer: ScriptedPeer) -> None:
    waiting = [peer.beside(lambda: peer.caller.infer("m", value(1))) for _ in range(4)]
    future = peer.caller.submit("m", value(2))
    told: Future[object] = Future()
    peer.caller.submit("m", value(3)).add_done_callback(told.set_result)
    peer.calls(6)
    peer.sock.close()
    for each in (*waiting, future):
        assert isinstance(each.exception(WAIT_S), errors.Unavailable)
    assert isinstance(told.result(WAIT_S).exception(), errors.Unavailable)  # type: ignore[attr-defined]
    with pytest.raises(NotSent, match="the worker is gone"):
        peer.caller.infer("m", value(4))
    until_no_watcher()


def test_a_goodbye_says_why(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(1))
    peer.calls(1)
    status = pb.Status(reason=pb.REASON_RESOURCE_EXHAUSTED, message="you hold too much")
    peer.send(lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status)))
    peer.sock.close()
    with pytest.raises(errors.Unavailable, match="you hold too much"):
        future.result(WAIT_S)


def test_a_goodbye_nobody_was_reading_is_still_told(peer: ScriptedPeer) -> None:
    status = pb.Status(reason=pb.REASON_RESOURCE_EXHAUSTED, message="you hold too much")
    peer.send(lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status)))
    peer.sock.close()
    with pytest.raises(NotSent, match="you hold too much"):
        peer.caller.infer("m", value(1))


def test_a_peer_that_reads_nothing_costs_no_more_than_the_timeout(peer: ScriptedPeer) -> None:
    def flood() -> None:
        for _ in range(10_000):
            peer.caller.submit("m", value(1), timeout=0.05).cancel()
            peer.answer(pb.InferRequest(call=0))

    with pytest.raises(errors.TimedOut):
        flood()


@pytest.mark.parametrize("packet", [b"\xff\xff\xff", b"x" * (1 << 16) + b"y"])
def test_a_packet_that_makes_no_sense_ends_the_lane(peer: ScriptedPeer, packet: bytes) -> None:
    future = peer.caller.submit("m", value(1))
    peer.calls(1)
    peer.sock.send(packet)
    with pytest.raises(errors.Unavailable, match="broke the lane's rules"):
        future.result(WAIT_S)


def test_memory_that_is_none_ends_the_lane(peer: ScriptedPeer) -> None:
    future = peer.caller.submit("m", value(1))
    peer.calls(1)
    peer.send(lane_pb2.LaneResponse(chunk=lane_pb2.Chunk(size=4096)))
    with pytest.raises(errors.Unavailable, match="memory that cannot be used"):
        future.result(WAIT_S)


@pytest.mark.parametrize("borrow", [False, True])
def test_a_result_outside_the_arena_is_the_servers_fault(peer: ScriptedPeer, borrow: bool) -> None:
    future = peer.caller.submit("m", value(1), borrow=borrow)
    [request] = peer.calls(1)
    output = request.inputs[0]
    output.ref.epoch, output.ref.size, output.ref.slot = 2, 16, 3
    peer.answer(request)
    with pytest.raises(errors.Internal, match="outside its arena"):
        future.result(WAIT_S)
    following = peer.caller.submit("m", value(1))
    [lease] = peer.receive().releases
    assert lease.slot == 3, "what cannot be read is given back"
    following.cancel()


def test_a_worker_that_hangs_up_at_once_when_told_of_the_end(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads sees that before the closing thread goes on."""
    waiting = peer.beside(lambda: peer.caller.infer("m", value(1)))
    peer.calls(1)
    talk = peer.caller.lane.talk
    send = talk.send

    def send_and_linger(message: lane_pb2.LaneRequest, deadline_s: float | None) -> None:
        send(message, deadline_s)
        peer.sock.close()
        assert waiting.exception(WAIT_S)

    monkeypatch.setattr(talk, "send", send_and_linger)
    peer.caller.close()
    assert isinstance(waiting.exception(WAIT_S), errors.Cancelled)


def test_closing_wakes_everybody_and_leaves_no_descriptor() -> None:
    before = open_files()
    with ScriptedPeer() as peer:
        waiting = [peer.beside(lambda: peer.caller.infer("m", value(1))) for _ in range(4)]
        peer.calls(4)
        peer.caller.close()
        for each in waiting:
            assert isinstance(each.exception(WAIT_S), errors.Cancelled)
    until(lambda: opened_since(before) == [], lambda: opened_since(before))
