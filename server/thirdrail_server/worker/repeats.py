# SPDX-License-Identifier: Apache-2.0
"""Requests that look like an earlier one, read without protobuf.

Most callers send one request again and again with other data. A session remembers where in such a
packet the call's number and the tensors' bytes lie; a packet of the same length with the same bytes
everywhere else says the same about everything else, so it is neither parsed nor checked again.
That takes 2 us in place of 8.

The wire format is protobuf's (https://protobuf.dev/programming-guides/encoding). A field that comes
twice counts as its last value, so only packets whose fields come once are remembered, except for
the call's number, whose last place counts.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from thirdrail.dtypes import BYTES
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2
from thirdrail_server.varints import NotUnderstood, varint_at
from thirdrail_server.worker.requests import Request
from thirdrail_server.worker.version_spec import VersionSpec

PACKET_BYTES_MAX = 8 << 10  # of larger ones the data takes the time
PATTERNS_PER_LENGTH_MAX = 4
LENGTHS_MAX = 64
# Looking at a packet costs as much as a few repeats save: one that never repeats must not cost that
# for ever.
CREDIT_START = 64
CREDIT_MAX = 1024
CALL_BYTES_MAX = 9  # 63 bits: a tenth byte holds bits that a number of 64 has no room for

# Keys of fields: number << 3 | type, which is 0 for a number and 2 for bytes and messages.
_INFER, _FLOW = 2 << 3 | 2, 6 << 3 | 0  # of LaneRequest
_CALL, _INPUT = 1 << 3 | 0, 6 << 3 | 2  # of InferRequest
_RAW, _VALUES, _REF = 4 << 3 | 2, 5 << 3 | 2, 6 << 3 | 2  # of Tensor


@dataclass(frozen=True, slots=True)
class _Data:
    """Where the elements of one input lie in the packet."""

    name: str
    offset: int
    count: int
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """What a remembered packet said, apart from its data and its call number."""

    model_name: str
    model_version: int
    spec: VersionSpec
    priority: int
    timeout_us: int
    flow: int
    like: Request  # without its inputs
    inputs: tuple[_Data, ...]
    call_at: tuple[int, int]
    pieces: tuple[tuple[int, bytes], ...]  # all other bytes, and where

    def fits(self, packet: bytes) -> bool:
        for offset, piece in self.pieces:  # noqa: SIM110 twice as fast as all()
            if not packet.startswith(piece, offset):
                return False
        return True

    def read(self, packet: bytes) -> Request | None:
        """The request of a packet that fits; None where the call's number is not one."""
        call = shift = 0
        start, end = self.call_at
        for byte in packet[start : end - 1]:
            if byte < 0x80:
                return None
            call |= (byte & 0x7F) << shift
            shift += 7
        last = packet[end - 1]
        if last >= 0x80:
            return None
        inputs: dict[str, Array] = {}
        for data in self.inputs:
            array = np.frombuffer(packet, data.dtype, data.count, data.offset)
            inputs[data.name] = array if len(data.shape) == 1 else array.reshape(data.shape)
        like = self.like
        return Request(
            call | last << shift,
            like.request_id,
            inputs,
            (),
            like.outputs,
            like.rows,
            like.signature,
            like.input_bytes,
        )


class Repeats:
    """What one session remembers of its packets."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[Repeat]] = {}
        self._credit = CREDIT_START

    def find(self, packet: bytes) -> Repeat | None:
        """An earlier packet that was like this one."""
        for repeat in self._by_length.get(len(packet), ()):
            if repeat.fits(packet):
                if self._credit < CREDIT_MAX:
                    self._credit += 1
                return repeat
        return None

    def remember(
        self, packet: bytes, message: lane_pb2.LaneRequest, request: Request, spec: VersionSpec
    ) -> None:
        """Keep what a packet said. message, request: read from it, and good."""
        if self._credit <= 0 or len(packet) > PACKET_BYTES_MAX:
            return
        self._credit -= 1
        try:
            repeat = _look_at(packet, message, request, spec)
        except NotUnderstood:
            return
        if len(self._by_length) >= LENGTHS_MAX:
            self._by_length.clear()
        alike = self._by_length.setdefault(len(packet), [])
        if len(alike) >= PATTERNS_PER_LENGTH_MAX:
            del alike[0]
        alike.append(repeat)

    def forget(self, packet: bytes) -> None:
        """What this packet was like means something else by now: its model was replaced."""
        self._by_length.pop(len(packet), None)


def _look_at(
    packet: bytes, message: lane_pb2.LaneRequest, request: Request, spec: VersionSpec
) -> Repeat:
    """Raises NotUnderstood for packets that are not worth remembering, or not safe to."""
    infer = message.infer
    if request.fetches or any(output.region is not None for output in request.outputs):
        raise NotUnderstood  # regions come and go
    if message.releases or infer.model_id:
        raise NotUnderstood
    call_at, raws = _places(packet)
    inputs = {}
    for (start, end), tensor in zip(raws, infer.inputs, strict=True):
        dtype = spec.inputs[tensor.name].dtype
        array = request.inputs[tensor.name]
        if dtype is BYTES or dtype.numpy is None or array.nbytes != end - start:
            raise NotUnderstood
        inputs[tensor.name] = _Data(tensor.name, start, array.size, dtype.numpy, array.shape)
    return Repeat(
        infer.model_name,
        infer.model_version,
        spec,
        infer.priority,
        infer.timeout_us,
        message.flow,
        dataclasses.replace(request, inputs={}),
        tuple(inputs[name] for name in request.inputs),
        call_at,
        tuple(_pieces_between(packet, sorted([call_at, *raws]))),
    )


def _pieces_between(packet: bytes, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    position = 0
    for start, end in [*places, (len(packet), len(packet))]:
        if start > position:
            yield position, packet[position:start]
        position = end


def _places(packet: bytes) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Where the call's number lies, and the raw bytes of each input."""
    view = memoryview(packet)
    if packet[0] != _INFER:
        raise NotUnderstood
    size, start = varint_at(view, 1, len(packet))
    end = start + size
    # The front says behind it whose request it is; whatever else comes there is not looked at.
    has_flow = end < len(packet) and packet[end] == _FLOW
    if (varint_at(view, end + 1, len(packet))[1] if has_flow else end) != len(packet):
        raise NotUnderstood
    call_at: tuple[int, int] | None = None
    raws = []
    for key, first, last in _fields(view, start, end):
        if key == _CALL:
            call_at = first, last
        elif key == _INPUT:
            forms = [f for f in _fields(view, first, last) if f[0] in (_RAW, _VALUES, _REF)]
            if len(forms) != 1 or forms[0][0] != _RAW:
                raise NotUnderstood
            raws.append(forms[0][1:])
    if call_at is None or call_at[1] - call_at[0] > CALL_BYTES_MAX:
        raise NotUnderstood
    return call_at, raws


def _fields(view: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: key, and where the value begins and ends."""
    while position < end:
        key, position = varint_at(view, position, end)
        kind = key & 7
        if kind == 0:
            after = varint_at(view, position, end)[1]
        elif kind == 2:
            size, position = varint_at(view, position, end)
            after = position + size
        else:
            raise NotUnderstood
        if after > end:
            raise NotUnderstood
        yield key, position, after
        position = after
