# SPDX-License-Identifier: Apache-2.0
"""Requests that make no sense are answered, and the session goes on."""

import numpy as np
import pytest

from support.lane_peer import LanePeer, Request, infer
from thirdrail.tensors import tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.config import LaneLimits

MIB = 1 << 20


def by_ref(**fields: int) -> Request:
    tensor = tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[4])
    tensor.ref.CopyFrom(tensor_pb2.ArenaRef(**fields))
    return infer(1, inputs=[tensor])


LAST = (1 << 64) - 64


@pytest.mark.parametrize(
    ("ref", "reason", "text"),
    [
        (
            {"epoch": 1, "size": 16},
            "FAILED_PRECONDITION",
            "tensor 'x' refers to epoch 1, this session has",
        ),
        ({"size": 16, "chunk": 1}, "INVALID_ARGUMENT", "tensor 'x' refers to chunk 1 of 1"),
        ({"size": 16, "chunk": (1 << 32) - 1}, "INVALID_ARGUMENT", "refers to chunk 4294967295"),
        ({"size": 16, "offset": MIB}, "INVALID_ARGUMENT", "to 1048592 of a chunk of 1048576"),
        ({"size": 16, "offset": 8}, "INVALID_ARGUMENT", "offsets are multiples of 64"),
        ({"size": 128, "offset": LAST}, "INVALID_ARGUMENT", "refers to bytes 18446744073709551552"),
        ({"size": (1 << 64) - 1}, "INVALID_ARGUMENT", "of a chunk of 1048576"),
        ({"size": 12}, "INVALID_ARGUMENT", "Expected 16, got 12"),
        ({"size": 0}, "INVALID_ARGUMENT", "Expected 16, got 0"),
        ({"size": 0, "offset": MIB}, "INVALID_ARGUMENT", "Expected 16, got 0"),
    ],
)
def test_references_to_other_memory_are_refused(
    peer: LanePeer, ref: dict[str, int], reason: str, text: str
) -> None:
    peer.send(Request(grow=lane_pb2.GrowRequest(size=1)))
    assert peer.receive().chunk.size == MIB
    status = peer.answer(by_ref(**{"epoch": peer.attachment.input_epoch, **ref})).status
    assert pb.Reason.Name(status.reason) == f"REASON_{reason}"
    assert text in status.message
    assert not peer.answer(infer(2)).status.reason, "the session goes on"


def test_the_output_memory_cannot_be_referred_to(peer: LanePeer) -> None:
    status = peer.answer(by_ref(epoch=peer.attachment.output_epoch, size=16)).status
    assert status.reason == pb.REASON_FAILED_PRECONDITION


def test_stale_releases_free_nothing(peer: LanePeer) -> None:
    large = np.arange(MIB // 4, dtype=np.float32)
    two = np.stack([large, large])  # 2 MiB each; 8 MiB fit
    request = infer(1, inputs=[])
    peer.send(Request(grow=lane_pb2.GrowRequest(size=two.nbytes)))
    peer.receive()
    tensor = request.infer.inputs.add(
        name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[two.size]
    )
    tensor.ref.CopyFrom(tensor_pb2.ArenaRef(epoch=peer.attachment.input_epoch, size=two.nbytes))
    answered = []
    for call in range(20):
        request.infer.call = call
        peer.send(request)
        while (response := peer.receive()).WhichOneof("message") == "chunk":
            pass
        if response.infer.status.reason:
            break
        ref = response.infer.outputs[0].ref
        answered.append(ref)
        stale = [(ref.epoch, ref.slot, ref.generation + 1), (ref.epoch + 1, ref.slot, 1)]
        stale += [(ref.epoch, 0, 0), (ref.epoch, ref.slot + 999, 1), (0, 0, 0)]
        leases = [lane_pb2.Lease(epoch=e, slot=s, generation=g) for e, s, g in stale]
        peer.send(Request(releases=leases))
    assert response.infer.status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert 2 <= len(answered) <= 4
    assert len({(ref.chunk, ref.offset) for ref in answered}) == len(answered)
    last = answered[-1]
    lease = lane_pb2.Lease(epoch=last.epoch, slot=last.slot, generation=last.generation)
    peer.send(Request(releases=[lease] * 3))  # the first counts, the others are late
    request.infer.call = 98
    assert not peer.answer(request).status.reason
    request.infer.call = 99
    assert peer.answer(request).status.reason == pb.REASON_RESOURCE_EXHAUSTED


def test_more_memory_than_there_may_be_is_refused(peer: LanePeer) -> None:
    for size in (1 << 63, (8 << 20) + 1):
        peer.send(Request(grow=lane_pb2.GrowRequest(size=size)))
        assert "of 8388608 are in use" in peer.receive().grow_refused.message
    assert not peer.answer(infer(2)).status.reason


def test_more_calls_than_agreed_are_refused(limits: LaneLimits, peer: LanePeer) -> None:
    """The calls wait for company that never comes, so none of them ends meanwhile."""
    calls = limits.calls_in_flight_max + 5
    a = tensor_of_array("a", np.zeros((1, 4), np.float32))
    b = tensor_of_array("b", np.zeros((1, 4), np.float32))
    peer.send(*(infer(call, "add", inputs=[a, b]) for call in range(calls)))
    answers = [peer.receive().infer for _ in range(calls)]
    assert sorted(each.call for each in answers) == list(range(calls))
    reasons = {each.status.reason for each in answers}
    assert reasons <= {0, pb.REASON_RESOURCE_EXHAUSTED}
