# SPDX-License-Identifier: Apache-2.0
"""A packet that is taken for a repeat says what protobuf and `read_request` say it says."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.specs import INDEX, SCALE, WORDS, X, a_tensor, spec_of
from thirdrail.lane import packets
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2
from thirdrail_server.worker import repeats
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.repeats import Repeat, Repeats
from thirdrail_server.worker.requests import Request, read_request
from thirdrail_server.worker.version_spec import VersionSpec

ONE = spec_of(X)
SPECS = st.sampled_from([ONE, spec_of(X, INDEX), spec_of(X, INDEX, SCALE), spec_of(X, rows_max=4)])


@pytest.fixture(scope="module")
def arena() -> Iterator[InputArena]:
    arena = InputArena(1 << 20)
    yield arena
    arena.close()


def read(packet: bytes, spec: VersionSpec, arena: InputArena) -> Request:
    return read_request(lane_pb2.LaneRequest.FromString(packet).infer, spec, arena.view)


def remembered(packet: bytes, spec: VersionSpec, arena: InputArena) -> Repeats:
    memory = Repeats()
    message = lane_pb2.LaneRequest.FromString(packet)
    memory.remember(packet, message, read_request(message.infer, spec, arena.view), spec)
    return memory


def a_packet(call: int, *, flow: int = 0, **fields: Any) -> bytes:
    fields = {"model_name": "m", "inputs": [a_tensor()], **fields}
    return lane_pb2.LaneRequest(
        infer=pb.InferRequest(call=call, **fields), flow=flow
    ).SerializeToString()


def with_call_behind(packet: bytes, call: int) -> bytes:
    """As our clients write it: the number behind everything else, where it counts as the last."""
    infer = lane_pb2.LaneRequest.FromString(packet).infer
    infer.ClearField("call")
    body = infer.SerializeToString() + b"\x08" + packets.varint(call)
    return b"\x12" + packets.varint(len(body)) + body


def same(one: Request, other: Request) -> bool:
    fields = ("call", "request_id", "copy_first", "outputs", "rows", "signature", "input_bytes")
    return (
        all(getattr(one, name) == getattr(other, name) for name in fields)
        and list(one.inputs) == list(other.inputs)
        and all(
            array.dtype == other.inputs[name].dtype
            and array.shape == other.inputs[name].shape
            and array.tobytes() == other.inputs[name].tobytes()
            for name, array in one.inputs.items()
        )
    )


def found(memory: Repeats, packet: bytes) -> Repeat:
    repeat = memory.find(packet)
    assert repeat is not None
    return repeat


CALLS = st.one_of(st.integers(0, 300), st.sampled_from([2**14, 2**21 - 1, 2**32, 2**63 - 1]))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[VersionSpec, bytes, bytes]:
    """Two packets that differ in their data and their numbers, and sometimes in more."""
    spec = draw(SPECS)
    rows = draw(st.integers(1, 3))

    def one(first: bool) -> bytes:
        inputs = []
        for name, expected in spec.inputs.items():
            shape = [rows if dim == -1 else dim for dim in expected.shape]
            size = int(np.prod(shape)) * expected.dtype.itemsize
            raw = draw(st.binary(min_size=size, max_size=size))
            inputs.append(
                tensor_pb2.Tensor(name=name, data_type=expected.dtype.value, shape=shape, raw=raw)
            )
        changes = not first and draw(st.booleans())
        packet = a_packet(
            draw(CALLS),
            inputs=inputs,
            request_id=draw(st.sampled_from(["", "a", "b"])) if changes else "a",
            priority=draw(st.integers(0, 1)) if changes else 1,
            timeout_us=draw(st.sampled_from([0, 5])) if changes else 0,
            flow=draw(st.integers(0, 2)) if changes else 0,
        )
        behind = draw(st.booleans()) and not lane_pb2.LaneRequest.FromString(packet).flow
        return with_call_behind(packet, draw(CALLS)) if behind else packet

    return spec, one(True), one(False)


@given(pair=pairs())
@settings(max_examples=400, deadline=None)
def test_a_repeat_is_read_as_protobuf_reads_it(
    arena: InputArena, pair: tuple[VersionSpec, bytes, bytes]
) -> None:
    spec, first, second = pair
    memory = remembered(first, spec, arena)
    repeat = memory.find(second)
    if repeat is not None:
        message = lane_pb2.LaneRequest.FromString(second)
        request = repeat.read(second)
        assert request is not None
        assert same(request, read(second, spec, arena))
        assert (repeat.priority, repeat.timeout_us) == (
            message.infer.priority,
            message.infer.timeout_us,
        )
        assert (repeat.model_name, repeat.flow) == (message.infer.model_name, message.flow)


@given(changed=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=400, deadline=None)
def test_a_changed_byte_is_never_overlooked(arena: InputArena, changed: int, value: int) -> None:
    packet = with_call_behind(a_packet(0, request_id="one"), 300)
    other = bytearray(packet)
    other[changed % len(packet)] = value
    mutated = bytes(other)
    repeat = remembered(packet, ONE, arena).find(mutated)
    request = repeat.read(mutated) if repeat is not None else None
    if request is not None:
        assert same(request, read(mutated, ONE, arena))


@pytest.mark.parametrize("call", [0, 1, 127, 128, 300, 2**62])
def test_the_same_with_other_data_is_a_repeat(arena: InputArena, call: int) -> None:
    memory = remembered(with_call_behind(a_packet(0), call), ONE, arena)
    data = np.arange(6, dtype=np.float32).tobytes()
    packet = with_call_behind(a_packet(0, inputs=[a_tensor(raw=data)]), call ^ 1)
    request = found(memory, packet).read(packet)
    assert request is not None
    assert request.call == call ^ 1
    assert request.inputs["x"].tobytes() == data


def test_a_generated_stubs_packet_repeats_as_well(arena: InputArena) -> None:
    memory = remembered(a_packet(5, flow=3), ONE, arena)
    packet = a_packet(6, flow=3)
    request = found(memory, packet).read(packet)
    assert request is not None
    assert request.call == 6
    assert memory.find(a_packet(6, flow=4)) is None


def test_what_can_mean_something_else_is_not_remembered(arena: InputArena) -> None:
    arena.grow(1).close()
    ref = tensor_pb2.ArenaRef(epoch=arena.epoch, size=24)
    values = tensor_pb2.Values(floats=[1, 2, 3, 4, 5, 6])
    twice = a_packet(5) + a_packet(5)  # two requests in one message are merged
    raws = b"\x22\x02ab" + a_packet(5)  # a field that nobody knows, in front
    released = a_packet(5) + lane_pb2.LaneRequest(releases=[lane_pb2.Lease()]).SerializeToString()
    packets_ = [
        a_packet(5, model_id=3),
        a_packet(5, inputs=[a_tensor(ref=ref)]),
        a_packet(5, inputs=[a_tensor(values=values)]),
        a_packet(0),  # nothing says where its number would be
        released,
    ]
    for packet in packets_:
        assert remembered(packet, ONE, arena).find(packet) is None
    memory = Repeats()
    good = lane_pb2.LaneRequest.FromString(a_packet(5))
    request = read_request(good.infer, ONE, arena.view)
    for packet in (twice, raws):
        memory.remember(packet, good, request, ONE)
        assert memory.find(packet) is None


def test_text_is_parsed_each_time(arena: InputArena) -> None:
    packet = a_packet(5, inputs=[a_tensor("s", "BYTES", [1], raw=b"\x02\0\0\0ab")])
    assert remembered(packet, spec_of(WORDS), arena).find(packet) is None


def test_packets_that_never_repeat_are_looked_at_no_more(arena: InputArena) -> None:
    memory = Repeats()
    for number in range(repeats.CREDIT_START + 1):
        packet = a_packet(5, request_id=f"{number:05}")
        message = lane_pb2.LaneRequest.FromString(packet)
        memory.remember(packet, message, read_request(message.infer, ONE, arena.view), ONE)
    assert memory.find(packet) is None


def test_a_large_packet_is_not_kept(arena: InputArena) -> None:
    packet = a_packet(5, request_id="x" * repeats.PACKET_BYTES_MAX)
    assert remembered(packet, ONE, arena).find(packet) is None


def test_forgetting(arena: InputArena) -> None:
    packet = a_packet(5)
    memory = remembered(packet, ONE, arena)
    memory.forget(packet)
    assert memory.find(packet) is None
