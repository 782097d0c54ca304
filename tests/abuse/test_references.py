# SPDX-License-Identifier: Apache-2.0
"""References to memory of others, or that is not there any more: refused, and nobody else notices.

Places outside of a session's own memory are in tests/lane/abuse/test_refused_requests.py.
"""

import numpy as np
import pytest

from support.anchored import Anchored
from support.handover_peer import HandOverPeer
from support.lane_peer import Request, by_ref, infer
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail.v1.tensor_pb2 import ArenaRef

LARGE = np.arange(1 << 16, dtype=np.float32)  # 256 KiB
SECRET = np.full(1 << 16, 42, np.float32)
EPOCHS_AROUND = 40
UINT32_MAX = (1 << 32) - 1
UINT64_MAX = (1 << 64) - 1


def changed(ref: ArenaRef, **fields: int) -> ArenaRef:
    other = ArenaRef()
    other.CopyFrom(ref)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


class Victim:
    """A session with memory of each kind, all of it full of SECRET."""

    def __init__(self, peer: HandOverPeer) -> None:
        self.peer = peer
        self.refs = {"input": peer.place(peer.grow(SECRET.nbytes), SECRET)}
        self.refs["output"] = peer.answer(by_ref(1, self.refs["input"], "identity")).outputs[0].ref
        self.refs["alone"] = peer.place(peer.grow(SECRET.nbytes, alone=True), SECRET)
        imported = peer.take(peer.export(self.refs["alone"], SECRET).token)
        self.refs["imported"] = ArenaRef(epoch=imported.epoch, size=imported.size)

    def has_noticed_nothing(self) -> None:
        for call, ref in enumerate(self.refs.values(), start=2):
            result = self.peer.answer(by_ref(call, ref, "identity")).outputs[0].ref
            assert np.array_equal(self.peer.read(result), SECRET)
            self.peer.release(result)


@pytest.fixture
def victim(anchored: Anchored) -> Victim:
    return Victim(HandOverPeer.adopt(anchored.attach()))


KINDS = ["input", "output", "alone", "imported"]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_another_session_cannot_be_used(
    anchored: Anchored, victim: Victim, kind: str
) -> None:
    """Neither as an input nor to be exported, copied by a ping, released or dropped."""
    peer = HandOverPeer.adopt(anchored.attach())
    own = peer.place(peer.grow(LARGE.nbytes), LARGE)
    ref = victim.refs[kind]
    refused = peer.answer(by_ref(1, ref, "identity")).status
    assert refused.reason == pb.REASON_FAILED_PRECONDITION
    assert str(ref.epoch) in refused.message
    assert peer.ask("ping", ref=ref).status.reason == pb.REASON_FAILED_PRECONDITION
    assert peer.export(ref, SECRET).status.reason in (
        pb.REASON_FAILED_PRECONDITION,
        pb.REASON_INVALID_ARGUMENT,
    )
    peer.release(ref)
    peer.drop(ref.epoch, ref.chunk)
    assert not peer.answer(by_ref(2, own, "identity")).status.reason
    victim.has_noticed_nothing()


def test_no_epoch_but_ones_own_leads_anywhere(anchored: Anchored, victim: Victim) -> None:
    peer = anchored.attach()
    own = peer.place(peer.grow(LARGE.nbytes), LARGE)
    epochs = {*range(EPOCHS_AROUND), UINT32_MAX, own.epoch + 1000}
    epochs |= set(range(max(0, own.epoch - EPOCHS_AROUND), own.epoch + EPOCHS_AROUND))
    for call, epoch in enumerate(sorted(epochs - {own.epoch}), start=1):
        for slot, generation in ((0, 0), (1, 1)):
            ref = changed(own, epoch=epoch, slot=slot, generation=generation)
            status = peer.answer(by_ref(call, ref, "identity")).status
            assert status.reason == pb.REASON_FAILED_PRECONDITION, (epoch, status)
    victim.has_noticed_nothing()


def test_a_released_result_is_no_input_of_anybody(anchored: Anchored) -> None:
    """Not even where its slot holds another result by now."""
    peer = anchored.attach()
    own = peer.place(peer.grow(LARGE.nbytes), LARGE)
    first = peer.answer(by_ref(1, own, "identity")).outputs[0].ref
    peer.release(first)
    second = peer.answer(by_ref(2, own, "identity")).outputs[0].ref
    assert (second.slot, second.offset) == (first.slot, first.offset)
    assert second.generation != first.generation
    for generation in (first.generation, second.generation + 1, 0, UINT32_MAX):
        stale = changed(second, generation=generation)
        status = peer.answer(by_ref(3, stale, "identity")).status
        assert status.reason == pb.REASON_FAILED_PRECONDITION
        assert "holds no result or was released" in status.message
    peer.release(first)  # again, and late
    assert not peer.answer(by_ref(4, second, "identity")).status.reason


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": UINT64_MAX},
        {"offset": UINT64_MAX - 63},  # -64
        {"offset": UINT64_MAX - 63, "size": 64},  # ends at 0
        {"offset": 1 << 63},
        {"size": UINT64_MAX - 3},
        {"size": 1 << 63, "offset": 1 << 63},  # together 0
        {"offset": 64},
        {"offset": 32},
        {"chunk": 2},
        {"chunk": UINT32_MAX},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["input", "output", "imported"])
def test_no_place_outside_of_a_piece_is_read(
    victim: Victim, kind: str, fields: dict[str, int]
) -> None:
    """By one's own references, either: sums that overflow, and negative numbers."""
    peer = victim.peer
    if kind == "input" and fields == {"offset": 64}:
        fields = {"offset": 1 << 20}  # the chunk is larger than the tensor
    ref = changed(victim.refs[kind], **fields)
    for request in (by_ref(9, ref, "identity"), Request(ping=lane_pb2.Ping(request=9, ref=ref))):
        peer.send(request)
        while (answer := peer.receive()).WhichOneof("message") == "chunk":
            pass
        status = answer.infer.status if answer.HasField("infer") else answer.pong.status
        assert status.reason in (pb.REASON_INVALID_ARGUMENT, pb.REASON_FAILED_PRECONDITION), answer
    victim.has_noticed_nothing()


def test_calls_of_others_cannot_be_cancelled(anchored: Anchored, victim: Victim) -> None:
    peer = anchored.attach()
    ref = victim.refs["input"]
    victim.peer.send(by_ref(77, ref, "identity"))
    peer.send(*[Request(cancel=pb.Cancel(call=call)) for call in (77, 1, 0, UINT64_MAX)])
    assert not peer.answer(infer(1)).status.reason
    answer = victim.peer.receive().infer
    assert (answer.call, answer.status.reason) == (77, 0)
    victim.peer.release(answer.outputs[0].ref)
    victim.has_noticed_nothing()


def test_a_token_for_a_tensor_is_not_guessed(anchored: Anchored, victim: Victim) -> None:
    token = victim.peer.export(victim.refs["alone"], SECRET).token
    peer = HandOverPeer.adopt(anchored.attach())
    for wrong in (b"", b"\0" * 16, token[:-1], token + b"\0", token[::-1], b"x" * 50_000):
        assert peer.take(wrong).status.reason == pb.REASON_FAILED_PRECONDITION
    assert not peer.take(token).status.reason
    assert peer.take(token).status.reason == pb.REASON_FAILED_PRECONDITION
    victim.has_noticed_nothing()
