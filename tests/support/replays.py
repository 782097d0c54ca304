# SPDX-License-Identifier: Apache-2.0
"""Recorded sessions played again: the client's half to a worker, the worker's half to a client.

Epochs, slots, offsets and call numbers of another run are others: they are translated by what they
stand for. Everything else goes out as it was recorded.
"""

import contextlib
import mmap
import os
import socket
from collections import deque
from collections.abc import Sequence

import numpy as np

from support.lane_peer import LanePeer
from support.recordings import PACKET_BYTES_MAX, Packet
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, tensor_pb2

Slot = tuple[int, int]  # number, generation


class RecordedClient:
    """Plays the client's half, and checks that the answers mean what they meant then."""

    def __init__(self, sock: socket.socket) -> None:
        self._peer = LanePeer(sock)
        self._then = lane_pb2.Attached()
        self._now = lane_pb2.Attached()
        self._slots: dict[Slot, tuple[tensor_pb2.ArenaRef, tensor_pb2.ArenaRef]] = {}
        self._sent: dict[int, bytes] = {}  # elements, by call

    def play(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            if packet.is_request:
                self._send(packet.data)
            else:
                self._expect(packet)
        with contextlib.suppress(EOFError):
            assert not self._peer.receive(), "nothing comes after a good end"

    def _send(self, data: bytes) -> None:
        request = lane_pb2.LaneRequest.FromString(data)
        for tensor in request.infer.inputs:
            if tensor.HasField("ref"):
                tensor.ref.CopyFrom(self._translated(tensor.ref))
            self._sent[request.infer.call] = self._elements(request.infer.call, tensor)
        for lease in request.releases:
            _, now = self._slots.pop((lease.slot, lease.generation))
            lease.epoch, lease.slot, lease.generation = now.epoch, now.slot, now.generation
        changed = request.SerializeToString()
        # An old client's bytes, where nothing had to be translated: it may write them in its way.
        same = request == lane_pb2.LaneRequest.FromString(data)
        self._peer.sock.send(data if same else changed)

    def _translated(self, then: tensor_pb2.ArenaRef) -> tensor_pb2.ArenaRef:
        now = tensor_pb2.ArenaRef.FromString(then.SerializeToString())
        if then.epoch == self._then.input_epoch:
            now.epoch = self._now.input_epoch
            return now
        slot_then, slot_now = self._slots[then.slot, then.generation]
        now.CopyFrom(slot_now)
        now.offset += then.offset - slot_then.offset
        now.size = then.size
        return now

    def _elements(self, call: int, tensor: tensor_pb2.Tensor) -> bytes:
        """What the request sends; what lies in input memory is written there first."""
        if not tensor.HasField("ref"):
            return tensor.raw
        mapping, ref = self._peer.chunks[tensor.ref.epoch, tensor.ref.chunk], tensor.ref
        if ref.epoch == self._now.input_epoch:
            count = ref.size // 4
            elements = np.arange(call, call + count, dtype=np.float32).tobytes()
            mapping[ref.offset : ref.offset + ref.size] = elements
        return bytes(mapping[ref.offset : ref.offset + ref.size])

    def _expect(self, packet: Packet) -> None:
        then, now = packet.response, self._peer.receive()
        assert now.WhichOneof("message") == then.WhichOneof("message"), now
        if then.HasField("attached"):
            self._then, self._now = then.attached, now.attached
            assert now.attached.version == then.attached.version
            assert set(then.attached.features) <= set(now.attached.features)
        elif then.HasField("chunk"):
            assert now.chunk.role == then.chunk.role
            assert (now.chunk.chunk, now.chunk.alone) == (then.chunk.chunk, then.chunk.alone)
            assert now.chunk.size >= then.chunk.size
        elif then.HasField("infer"):
            self._expect_response(then.infer, now.infer)

    def _expect_response(self, then: pb.InferResponse, now: pb.InferResponse) -> None:
        assert (now.call, now.final, now.status.reason) == (
            then.call,
            then.final,
            then.status.reason,
        )
        assert len(now.outputs) == len(then.outputs)
        for before, after in zip(then.outputs, now.outputs, strict=True):
            assert (after.name, after.data_type) == (before.name, before.data_type)
            assert list(after.shape) == list(before.shape)
            assert after.WhichOneof("data") == before.WhichOneof("data")
            if before.HasField("ref"):
                self._slots[before.ref.slot, before.ref.generation] = (before.ref, after.ref)
            assert self._received(after) == self._sent[now.call], "the model is an identity"

    def _received(self, tensor: tensor_pb2.Tensor) -> bytes:
        return self._peer.read(tensor.ref).tobytes() if tensor.HasField("ref") else tensor.raw


class RecordedWorker:
    """Plays the worker's half: each of the client's messages gets what was answered to its like,
    in the order of the recording. Its only model is an identity.
    """

    def __init__(self, sock: socket.socket, packets: Sequence[Packet]) -> None:
        self._sock = sock
        self._answers: dict[str, deque[list[Packet]]] = {}
        self._chunks: dict[tuple[int, int], mmap.mmap] = {}
        for packet in packets:
            if packet.is_request:
                answer: list[Packet] = []
                kind = packet.request.WhichOneof("message") or ""
                self._answers.setdefault(kind, deque()).append(answer)
            else:
                answer.append(packet)

    def serve(self) -> None:
        """Until the client closes the session or hangs up."""
        with self._sock:
            while packet := self._sock.recv(PACKET_BYTES_MAX):
                request = lane_pb2.LaneRequest.FromString(packet)
                kind = request.WhichOneof("message") or ""
                if kind == "close":
                    return
                if kind not in ("", "cancel"):
                    for recorded in self._answers[kind].popleft():
                        self._answer(request, recorded)

    def _answer(self, request: lane_pb2.LaneRequest, recorded: Packet) -> None:
        response = recorded.response
        fds = [self._memory(response.chunk)] if recorded.has_memory else []
        if response.HasField("infer"):
            response.infer.call = request.infer.call
            for output in response.infer.outputs:
                self._compute(request.infer.inputs[0], output)
        same = response == recorded.response
        data = recorded.data if same else response.SerializeToString()
        socket.send_fds(self._sock, [data], fds)
        for fd in fds:
            os.close(fd)

    def _memory(self, chunk: lane_pb2.Chunk) -> int:
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        fd, mapping = create_chunk(chunk.size, client_writes=is_input, alone=chunk.alone)
        self._chunks[chunk.epoch, chunk.chunk] = mapping
        return fd

    def _compute(self, tensor: tensor_pb2.Tensor, output: tensor_pb2.Tensor) -> None:
        elements = tensor.raw
        if tensor.HasField("ref"):
            ref = tensor.ref
            elements = self._chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size]
        if output.HasField("ref"):
            ref = output.ref
            self._chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size] = elements
        else:
            output.raw = elements
