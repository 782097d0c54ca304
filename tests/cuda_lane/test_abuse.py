# SPDX-License-Identifier: Apache-2.0
"""What a client may say of a device, and what is made of it when it is wrong."""

from typing import Any

import numpy as np
import pytest

from cuda_lane.conftest import UUID, MakePeer
from support.device_peer import DevicePeer, on_device
from support.killable import until
from support.lane_peer import Request, infer
from support.worker import RunningWorker
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2

X = np.arange(8, dtype=np.float32)
MIB = 1 << 20


@pytest.fixture
def source(peer: DevicePeer) -> tensor_pb2.ArenaRef:
    return peer.put(peer.grow_on_device(X.nbytes), X)


def works(peer: DevicePeer, source: tensor_pb2.ArenaRef, call: int = 1000) -> None:
    for place in range(1, 5):
        peer.record_in_ready(place)
        response = peer.answer(on_device(call + place, place, {"x": source}, "twin_double", ["y"]))
        assert not response.HasField("status"), response.status
        assert peer.out_done(place).wait(20)
        assert peer.get(response.outputs[0].ref).tolist() == (2 * X).tolist()
        peer.release(response.outputs[0].ref)


def test_without_a_device(make_peer: MakePeer) -> None:
    peer = make_peer()
    response = peer.answer(on_device(1, 1, {"x": X}, "twin_double"))
    assert response.status.reason == pb.REASON_FAILED_PRECONDITION
    assert "send a DeviceRequest first" in response.status.message
    peer.send(Request(grow=lane_pb2.GrowRequest(size=1, on_device=True)))
    assert "for a session that has one" in peer.receive().grow_refused.message
    refused = peer.ask_for_device("GPU-1234")
    assert refused.status.reason == pb.REASON_INVALID_ARGUMENT
    assert f"computes on {UUID}" in refused.status.message
    assert not peer.ask_for_device(UUID[:9].lower()).HasField("status")


def test_references_without_a_place(peer: DevicePeer, source: tensor_pb2.ArenaRef) -> None:
    response = peer.answer(on_device(1, 0, {"x": source}, "twin_double"))
    assert response.status.reason == pb.REASON_FAILED_PRECONDITION
    response = peer.answer(on_device(2, 0, {"x": X}, "twin_double", ["y"]))
    assert response.status.reason == pb.REASON_INVALID_ARGUMENT
    assert "which needs an event_place" in response.status.message
    works(peer, source)


@pytest.mark.parametrize("place", [5, 64, 2**32 - 1])
def test_a_place_that_is_none(peer: DevicePeer, source: tensor_pb2.ArenaRef, place: int) -> None:
    response = peer.answer(on_device(1, place, {"x": source}, "twin_double", ["y"]))
    assert response.status.reason == pb.REASON_INVALID_ARGUMENT
    assert f"a call names place {place} of a ring" in response.status.message
    works(peer, source)


def test_a_place_that_is_taken(peer: DevicePeer, source: tensor_pb2.ArenaRef) -> None:
    waits = peer.record_in_ready(1, is_done=False)
    peer.send(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
    response = peer.answer(on_device(2, 1, {"x": source}, "twin_double", ["y"]))
    assert (response.call, response.status.reason) == (2, pb.REASON_INVALID_ARGUMENT)
    assert "expected one that is free or" in response.status.message
    waits.set()
    while (message := peer.receive()).WhichOneof("message") == "chunk":
        pass
    (y,) = message.infer.outputs
    response = peer.answer(on_device(3, 1, {"x": source}, "twin_double", ["y"]))
    assert "the client has the results" in response.status.message
    peer.release(y.ref)
    works(peer, source)


WRONG: list[tuple[dict[str, int], int, str]] = [
    ({"chunk": 1}, pb.REASON_INVALID_ARGUMENT, "refers to chunk 1 of 1 on the device"),
    ({"chunk": 2**32 - 1}, pb.REASON_INVALID_ARGUMENT, "of 1 on the device"),
    ({"offset": 64}, pb.REASON_INVALID_ARGUMENT, "offsets are multiples of 256"),
    ({"offset": 2 * MIB}, pb.REASON_INVALID_ARGUMENT, "of a chunk of 2097152 on the device"),
    ({"offset": 2**63}, pb.REASON_INVALID_ARGUMENT, "of a chunk of 2097152 on the device"),
    ({"size": 4 * MIB}, pb.REASON_INVALID_ARGUMENT, "of a chunk of 2097152 on the device"),
    ({"size": 16}, pb.REASON_INVALID_ARGUMENT, "Expected 32, got 16"),
    ({"epoch": 10**6}, pb.REASON_FAILED_PRECONDITION, "tensor 'x'"),
    ({"epoch": -1}, pb.REASON_FAILED_PRECONDITION, "slot 0, generation 0"),
    ({"epoch": -1, "slot": 1}, pb.REASON_FAILED_PRECONDITION, "holds no result or was released"),
    ({"epoch": -1, "slot": 99}, pb.REASON_FAILED_PRECONDITION, "slot 99"),
]


@pytest.mark.parametrize(("fields", "reason", "text"), WRONG)
def test_a_reference_to_elsewhere(
    peer: DevicePeer, source: tensor_pb2.ArenaRef, fields: dict[str, Any], reason: int, text: str
) -> None:
    """epoch -1: of the results on the device."""
    if fields.get("epoch") == -1:
        fields = fields | {"epoch": peer.device.output_epoch}
    ref = tensor_pb2.ArenaRef()
    ref.CopyFrom(source)
    for name, value in fields.items():
        setattr(ref, name, value)
    request = on_device(1, 1, {"x": ref}, "twin_double", ["y"])
    request.infer.inputs[0].shape[:] = [8]
    response = peer.answer(request)
    assert response.status.reason == reason
    assert text in response.status.message
    works(peer, source)


def test_a_result_of_another_session(make_peer: MakePeer, peer: DevicePeer) -> None:
    other = make_peer()
    other.ask_for_device()
    theirs = other.put(other.grow_on_device(X.nbytes), X)
    response = peer.answer(on_device(1, 1, {"x": theirs}, "twin_double", ["y"]))
    assert response.status.reason == pb.REASON_FAILED_PRECONDITION


def test_releases_that_are_none(peer: DevicePeer, source: tensor_pb2.ArenaRef) -> None:
    peer.record_in_ready(1)
    response = peer.answer(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
    (y,) = response.outputs
    epoch = peer.device.output_epoch
    wrong = [(epoch, 1, 99), (epoch, 0, 0), (epoch, 5, 1), (epoch, 2, 1), (epoch + 7, 1, 1)]
    leases = [lane_pb2.Lease(epoch=e, slot=s, generation=g) for e, s, g in wrong]
    peer.send(Request(releases=leases))
    assert peer.out_done(1).wait(20)
    assert peer.get(y.ref).tolist() == (2 * X).tolist()
    peer.record_in_ready(2)
    again = peer.answer(on_device(2, 2, {"x": y.ref}, "twin_double", ["y"]))
    assert not again.HasField("status"), "it is leased still"
    for _ in range(3):
        peer.release(y.ref)
    peer.release(again.outputs[0].ref)
    response = peer.answer(on_device(3, 3, {"x": y.ref}, "twin_double", ["y"]))
    assert response.status.reason == pb.REASON_FAILED_PRECONDITION
    works(peer, source)


def test_counters_that_are_nonsense(peer: DevicePeer, source: tensor_pb2.ArenaRef) -> None:
    peer.inputs._table[:] = 2**63
    response = peer.answer(on_device(1, 1, {"x": source}, "twin_double", ["y"]))
    assert not response.HasField("status")
    peer.release(response.outputs[0].ref)
    peer.inputs._table[:] = 0
    works(peer, source)


def test_what_cannot_lie_there(peer: DevicePeer, source: tensor_pb2.ArenaRef) -> None:
    request = on_device(1, 1, {"x": source}, "twin_double", ["y"])
    request.infer.outputs[0].class_count = 1
    response = peer.answer(request)
    assert "is a class result, which cannot lie on a device" in response.status.message
    works(peer, source)


# Limits


def test_an_arena_on_the_device_has_a_bound(peer: DevicePeer) -> None:
    assert peer.grow_on_device(3 * MIB).size == 4 * MIB
    assert peer.grow_on_device(3 * MIB).size == 4 * MIB  # what doubling gives
    peer.send(Request(grow=lane_pb2.GrowRequest(size=3 * MIB, on_device=True)))
    message = peer.receive().grow_refused.message
    assert f"{3 * MIB} more bytes of input memory on the device were asked for" in message


def test_results_have_a_bound(peer: DevicePeer) -> None:
    large = peer.put(peer.grow_on_device(3 * MIB), np.ones(3 * MIB // 4, np.float32))
    peer.record_in_ready(1)
    first = peer.answer(on_device(1, 1, {"x": large}, "host_double", ["y"]))
    assert not first.HasField("status")
    peer.record_in_ready(2)
    second = peer.answer(on_device(2, 2, {"x": large}, "host_double", ["y"]))
    assert second.status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert "hold results that were not released yet" in second.status.message
    peer.release(first.outputs[0].ref)
    peer.record_in_ready(2)
    assert not peer.answer(on_device(3, 2, {"x": large}, "host_double", ["y"])).HasField("status")


def test_all_sessions_of_a_user_have_a_bound(worker: RunningWorker, make_peer: MakePeer) -> None:
    until(lambda: all(each.is_front for each in worker.sessions().values()))  # the others' memory
    peers = [make_peer() for _ in range(5)]
    for each in peers:
        each.ask_for_device()
    for each in peers[:4]:
        each.grow_on_device(8 * MIB)
    peers[4].send(Request(grow=lane_pb2.GrowRequest(size=8 * MIB, on_device=True)))
    message = peers[4].receive().grow_refused.message
    assert f"may have {32 * MIB}" in message
    assert not peers[4].answer(infer(1, "host_double")).HasField("status")
    peers[0].leave()
    while True:  # until the first one's memory is back
        peers[4].send(Request(grow=lane_pb2.GrowRequest(size=8 * MIB, on_device=True)))
        if peers[4].receive().WhichOneof("message") == "chunk":
            break
