# SPDX-License-Identifier: Apache-2.0
"""A lane's client with memory on a twin, which sends exactly what a test tells it to."""

import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from support.lane_peer import PACKET_BYTES_MAX, LanePeer, Request, Response, lease_of
from thirdrail.device.twin import TwinCounters, TwinMemory, TwinRecord
from thirdrail.tensors import Array, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2


class DevicePeer(LanePeer):
    """device: the worker's answer, once there was a good one. source: what a test has there."""

    device: lane_pb2.DeviceAttached
    source: tensor_pb2.ArenaRef

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.memory: dict[tuple[int, int], TwinMemory] = {}  # on the device, by epoch and number

    def receive(self) -> Response:
        packet, fds, _, _ = socket.recv_fds(self.sock, PACKET_BYTES_MAX, 4)
        if not packet:
            raise EOFError
        response = Response.FromString(packet)
        if response.WhichOneof("message") == "device_attached" and fds:
            attached = self.device = response.device_attached
            theirs, ours = fds
            self.inputs = TwinCounters.open(theirs, 2 * attached.places, writable=True)
            self.outputs = TwinCounters.open(ours, attached.places, writable=False)
        elif response.WhichOneof("message") == "chunk":
            chunk = response.chunk
            self.memory[chunk.epoch, chunk.chunk] = TwinMemory.open(fds[0], chunk.size)
        return response

    def ask_for_device(self, uuid: str = "") -> lane_pb2.DeviceAttached:
        self.send(Request(device=lane_pb2.DeviceRequest(request=7, uuid=uuid)))
        answer = self.receive().device_attached
        assert answer.request == 7
        return answer

    def grow_on_device(self, size: int) -> lane_pb2.Chunk:
        return self.grow(size, on_device=True)

    def put(self, chunk: lane_pb2.Chunk, array: Array, offset: int = 0) -> tensor_pb2.ArenaRef:
        memory = self.memory[chunk.epoch, chunk.chunk]
        memory.view[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        return tensor_pb2.ArenaRef(
            epoch=chunk.epoch, chunk=chunk.chunk, offset=offset, size=array.nbytes
        )

    def get(self, ref: tensor_pb2.ArenaRef) -> Array:
        """A copy of what lies there now, as float32."""
        view = self.memory[ref.epoch, ref.chunk].view
        return view[ref.offset : ref.offset + ref.size].view(np.float32).copy()

    # Events, by place

    def record_in_ready(self, place: int, *, is_done: bool = True) -> TwinRecord:
        return _recorded(self.inputs.record(place - 1), is_done)

    def record_consumed(self, place: int, *, is_done: bool = True) -> TwinRecord:
        return _recorded(self.inputs.record(self.device.places + place - 1), is_done)

    def out_done(self, place: int) -> TwinRecord:
        record = self.outputs.last_record(place - 1)
        assert record is not None
        return record

    def release(self, *refs: tensor_pb2.ArenaRef) -> None:
        for ref in refs:
            self.record_consumed(ref.slot)
        self.send(Request(releases=[lease_of(ref) for ref in refs]))


def _recorded(record: TwinRecord, is_done: bool) -> TwinRecord:
    if is_done:
        record.set()
    return record


def on_device(
    call: int,
    place: int,
    inputs: dict[str, tensor_pb2.ArenaRef | Array],
    model: str,
    outputs: Sequence[str] = (),
    **fields: Any,
) -> Request:
    """A call with float32 vectors, of which those that are references lie somewhere."""
    request = pb.InferRequest(call=call, model_name=model, event_place=place, **fields)
    for name, value in inputs.items():
        if isinstance(value, tensor_pb2.ArenaRef):
            tensor = tensor_pb2.Tensor(
                name=name, data_type=tensor_pb2.DATA_TYPE_FP32, shape=[value.size // 4]
            )
            tensor.ref.CopyFrom(value)
            request.inputs.append(tensor)
        else:
            request.inputs.append(tensor_of_array(name, value))
    request.outputs.extend(pb.RequestedOutput(name=name, on_device=True) for name in outputs)
    return Request(infer=request)
