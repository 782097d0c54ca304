# SPDX-License-Identifier: Apache-2.0
"""A client's books of a session's memory on a device."""

from types import SimpleNamespace
from typing import Any

import pytest

from thirdrail.errors import ResourceExhausted
from thirdrail.lane.device_memory import DeviceMemory, Slot
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2

HOST, DEVICE = 7, 8  # epochs of output arenas


@pytest.fixture
def host() -> SessionMemory:
    return SessionMemory(lane_pb2.Attached(output_epoch=HOST))


@pytest.fixture
def memory() -> DeviceMemory:
    chunks: Any = SimpleNamespace(runtime=None, output_epoch=DEVICE)
    return DeviceMemory(lane_pb2.DeviceAttached(places=2), chunks)


def answer(*epochs: int) -> pb.InferResponse:
    """With an output in each of these arenas, in slot 1 of generation 5."""
    response = pb.InferResponse(final=True)
    for epoch in epochs:
        ref = tensor_pb2.ArenaRef(epoch=epoch, slot=1, generation=5, size=4)
        response.outputs.add(name=str(epoch)).ref.CopyFrom(ref)
    return response


def released(host: SessionMemory) -> list[lane_pb2.Lease]:
    return list(lane_pb2.LaneRequest.FromString(host.releases.take(1000)).releases)


def test_places_are_taken_in_turns(memory: DeviceMemory) -> None:
    assert [memory.take_place(), memory.take_place()] == [1, 2]
    with pytest.raises(ResourceExhausted, match="hold all 2 places"):
        memory.take_place()
    memory.leave_place(2)
    assert memory.take_place() == 2


@pytest.mark.parametrize("response", [None, answer(), answer(HOST)])
def test_a_place_is_free_at_once_where_nothing_is_on_the_device(
    memory: DeviceMemory, host: SessionMemory, response: pb.InferResponse | None
) -> None:
    memory.recover(response, memory.take_place(), host)
    assert memory.places_free == 2
    assert not memory.is_shown
    assert len(released(host)) == (response is not None and len(response.outputs))


def test_an_answer_that_nobody_takes_goes_back_on_both_sides(
    memory: DeviceMemory, host: SessionMemory
) -> None:
    """Slots of one number and generation, in two arenas."""
    memory.recover(answer(DEVICE, HOST, DEVICE), memory.take_place(), host)
    assert released(host) == [lane_pb2.Lease(epoch=HOST, slot=1, generation=5)]
    (slot,) = memory.take_returned()
    assert slot == Slot(1, 0, lane_pb2.Lease(epoch=DEVICE, slot=1, generation=5))
    assert memory.places_free == 1  # until the lease is sent
    assert list(memory.take_returned()) == []
    memory.recover(answer(HOST), memory.take_place(), None)  # that was done
    assert released(host) == []
