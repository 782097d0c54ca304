# SPDX-License-Identifier: Apache-2.0
"""A lane's client that sends exactly what a test tells it to, and maps what it is given."""

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from thirdrail.lane.memory import map_chunk
from thirdrail.tensors import Array, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, sessions_pb2, tensor_pb2

ANSWER_S_MAX = 60
PACKET_BYTES_MAX = 64 << 10
X = np.array([1, 2, 3], np.float32)

Request = lane_pb2.LaneRequest
Response = lane_pb2.LaneResponse


def infer(call: int, model: str = "identity_fp32", **fields: Any) -> Request:
    """A call with the input `x` inline, unless `inputs` says otherwise."""
    request = pb.InferRequest(call=call, model_name=model, **fields)
    if "inputs" not in fields:
        request.inputs.append(tensor_of_array("x", X))
    return Request(infer=request)


def by_ref(call: int, ref: tensor_pb2.ArenaRef, model: str = "identity_fp32") -> Request:
    """A call whose input `x` lies where the reference says, as float32."""
    tensor = tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[ref.size // 4])
    tensor.ref.CopyFrom(ref)
    return infer(call, model, inputs=[tensor])


def hello(
    version_min: int = 1,
    version_max: int = 1,
    features: Sequence[str] = (),
    token: bytes = b"",
    client_name: str = "",
) -> Request:
    return Request(
        hello=lane_pb2.Hello(
            version_min=version_min,
            version_max=version_max,
            features=features,
            token=token,
            client_name=client_name,
        )
    )


def connect(path: str | os.PathLike[str]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(ANSWER_S_MAX)
    sock.connect(os.fspath(path))
    return sock


class LanePeer:
    """attachment: the worker's answer to our hello, once there was one."""

    attachment: lane_pb2.Attached

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(ANSWER_S_MAX)
        self.chunks: dict[tuple[int, int], mmap.mmap] = {}  # by epoch and number

    @classmethod
    def of(cls, opened: sessions_pb2.OpenSessionResponse, **fields: Any) -> "LanePeer":
        """Connected and attached with the token of OpenSession."""
        peer = cls(connect(opened.socket_path))
        peer.attach(token=opened.token, **fields)
        return peer

    def attach(self, **fields: Any) -> lane_pb2.Attached:
        self.send(hello(**fields))
        response = self.receive()
        assert response.WhichOneof("message") == "attached", response
        self.attachment = response.attached
        return response.attached

    def send(self, *messages: Request) -> None:
        for message in messages:
            self.sock.send(message.SerializeToString())

    def receive(self) -> Response:
        """The next message. Raises EOFError at the session's end, also where it was cut off."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.sock, PACKET_BYTES_MAX, 4)
        except ConnectionResetError:
            raise EOFError from None
        if not packet:
            raise EOFError
        response = Response.FromString(packet)
        if response.WhichOneof("message") == "chunk":
            chunk = response.chunk
            (fd,) = fds
            mapping = map_chunk(fd, chunk.size, writable=chunk.role == lane_pb2.ARENA_ROLE_INPUT)
            self.chunks[chunk.epoch, chunk.chunk] = mapping
            return response
        for fd in fds:
            os.close(fd)
        return response

    def answer(self, message: Request) -> pb.InferResponse:
        """The response to a call, past the chunks that come before it."""
        self.send(message)
        while (response := self.receive()).WhichOneof("message") == "chunk":
            pass
        return response.infer

    def grow(self, size: int, **fields: Any) -> lane_pb2.Chunk:
        """More input memory."""
        self.send(Request(grow=lane_pb2.GrowRequest(size=size, **fields)))
        response = self.receive()
        assert response.WhichOneof("message") == "chunk", response
        return response.chunk

    def place(self, chunk: lane_pb2.Chunk, array: Array, offset: int = 0) -> tensor_pb2.ArenaRef:
        data = array.tobytes()
        self.chunks[chunk.epoch, chunk.chunk][offset : offset + len(data)] = data
        return tensor_pb2.ArenaRef(
            epoch=chunk.epoch, chunk=chunk.chunk, offset=offset, size=len(data)
        )

    def read(self, ref: tensor_pb2.ArenaRef) -> Array:
        """A copy of what lies there, as float32."""
        return np.frombuffer(self.read_bytes(ref), np.float32)

    def read_bytes(self, ref: tensor_pb2.ArenaRef) -> bytes:
        return self.chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size]

    def release(self, *refs: tensor_pb2.ArenaRef) -> None:
        self.send(Request(releases=[lease_of(ref) for ref in refs]))

    def goodbye(self) -> pb.Status:
        """The last packet, whatever comes before it."""
        response = Response()
        with contextlib.suppress(EOFError):
            while True:
                response = self.receive()
        assert response.WhichOneof("message") == "goodbye", response
        return response.goodbye.status

    def wait_for_hang_up(self) -> None:
        """Until the other end is closed, whatever there is still to read."""
        poll = select.poll()
        poll.register(self.sock, 0)
        assert poll.poll(ANSWER_S_MAX * 1000)
        time.sleep(0.05)  # shutting down is seen a moment before closing

    def is_cut_off(self) -> bool:
        try:
            self.sock.send(infer(1).SerializeToString())
        except ConnectionError:
            return True
        return False

    def leave(self) -> None:
        """In good order: the memory comes back at once, although this process lives on."""
        self.send(Request(close=lane_pb2.Close()))
        self.close()

    def close(self) -> None:
        """Break off, without a word."""
        self.sock.close()
        self.chunks.clear()


def lease_of(ref: tensor_pb2.ArenaRef) -> lane_pb2.Lease:
    return lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation)
