# SPDX-License-Identifier: Apache-2.0
"""Recorded sessions played again: the client's half to a worker, the worker's half to a client.

Epochs, slots, offsets, tokens and numbers of another run are others: they are translated by what
they stand for. Everything else goes out as it was recorded.
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
        self._input_epoch = 0
        self._epochs: dict[int, int] = {}  # then -> now
        self._slots: dict[Slot, tuple[tensor_pb2.ArenaRef, tensor_pb2.ArenaRef]] = {}
        self._export = lane_pb2.Exported()
        self._sent: dict[int, bytes] = {}  # elements, by call
        self._shared = b""  # elements of the exported tensor

    def play(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            if packet.is_request:
                self._send(packet.data)
            else:
                self._expect(packet)
        with contextlib.suppress(EOFError):
            assert not self._peer.receive(), "nothing comes after a good end"

    # Sending

    def _send(self, data: bytes) -> None:
        request = lane_pb2.LaneRequest.FromString(data)
        for tensor in request.infer.inputs:
            if tensor.HasField("ref"):
                tensor.ref.CopyFrom(self._translated(tensor.ref))
            self._sent[request.infer.call] = self._elements(request.infer.call, tensor)
        for lease in request.releases:
            _, now = self._slots.pop((lease.slot, lease.generation))
            lease.epoch, lease.slot, lease.generation = now.epoch, now.slot, now.generation
        self._translate_handover(request)
        # An old client's own bytes where nothing had to be translated: it may have written them in
        # another way than we do.
        is_same = request == lane_pb2.LaneRequest.FromString(data)
        self._peer.sock.send(data if is_same else request.SerializeToString())

    def _translate_handover(self, request: lane_pb2.LaneRequest) -> None:
        if request.HasField("export_tensor"):
            ref = self._translated(request.export_tensor.ref)
            request.export_tensor.ref.CopyFrom(ref)
            self._shared = self._elements(0, tensor_pb2.Tensor(ref=ref))
        elif request.HasField("import_tensor"):
            request.import_tensor.token = self._export.token
        elif request.HasField("revoke"):
            request.revoke.export_id = self._export.export_id
        elif request.HasField("drop"):
            request.drop.epoch = self._epochs[request.drop.epoch]

    def _translated(self, then: tensor_pb2.ArenaRef) -> tensor_pb2.ArenaRef:
        now = tensor_pb2.ArenaRef.FromString(then.SerializeToString())
        now.epoch = self._epochs[then.epoch]
        if then.slot:
            slot_then, slot_now = self._slots[then.slot, then.generation]
            now.chunk, now.slot, now.generation = slot_now.chunk, slot_now.slot, slot_now.generation
            now.offset += slot_now.offset - slot_then.offset
        return now

    def _elements(self, call: int, tensor: tensor_pb2.Tensor) -> bytes:
        """What a request refers to or carries; what lies in input memory is written there first."""
        if not tensor.HasField("ref"):
            return tensor.raw
        ref = tensor.ref
        if (ref.epoch, ref.chunk) not in self._peer.chunks:
            return self._shared[ref.offset : ref.offset + ref.size]
        mapping = self._peer.chunks[ref.epoch, ref.chunk]
        if ref.epoch == self._input_epoch:
            elements = np.arange(call, call + ref.size // 4, dtype=np.float32).tobytes()
            mapping[ref.offset : ref.offset + ref.size] = elements
        return bytes(mapping[ref.offset : ref.offset + ref.size])

    # Receiving

    def _expect(self, packet: Packet) -> None:
        then, now = packet.response, self._peer.receive()
        assert now.WhichOneof("message") == then.WhichOneof("message"), now
        if then.HasField("attached"):
            self._expect_attached(then.attached, now.attached)
        elif then.HasField("chunk"):
            assert now.chunk.role == then.chunk.role
            assert (now.chunk.chunk, now.chunk.alone) == (then.chunk.chunk, then.chunk.alone)
            assert now.chunk.size >= then.chunk.size
        elif then.HasField("infer"):
            self._expect_response(then.infer, now.infer)
        elif then.HasField("exported"):
            assert not now.exported.status.reason
            assert now.exported.copies <= then.exported.copies
            self._export = now.exported
        elif then.HasField("imported"):
            self._expect_imported(then.imported, now.imported)
        elif then.HasField("revoked"):
            assert now.revoked.request == then.revoked.request

    def _expect_attached(self, then: lane_pb2.Attached, now: lane_pb2.Attached) -> None:
        assert now.version == then.version
        assert set(then.features) <= set(now.features)
        self._input_epoch = now.input_epoch
        self._epochs = {
            then.input_epoch: now.input_epoch,
            then.output_epoch: now.output_epoch,
        }

    def _expect_imported(self, then: lane_pb2.Imported, now: lane_pb2.Imported) -> None:
        self._epochs[then.epoch] = now.epoch
        assert (now.request, now.status) == (then.request, then.status)
        assert (now.size, now.data_type) == (then.size, then.data_type)
        assert list(now.shape) == list(then.shape)

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
        self._shared = b""  # elements of the exported tensor
        self._token = b""  # that it was exported by
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
                if kind not in ("", "cancel", "drop"):
                    for recorded in self._answers[kind].popleft():
                        self._answer(request, recorded)

    def _answer(self, request: lane_pb2.LaneRequest, recorded: Packet) -> None:
        response = recorded.response
        fds = []
        if response.HasField("chunk"):
            fds = [self._memory(response.chunk)]
        elif response.HasField("infer"):
            response.infer.call = request.infer.call
            for output in response.infer.outputs:
                self._put(self._elements(request.infer.inputs[0]), output)
        elif response.HasField("exported"):
            self._shared = self._elements(tensor_pb2.Tensor(ref=request.export_tensor.ref))
            self._token = response.exported.token
        elif response.HasField("imported"):
            assert request.import_tensor.token == self._token
            fds = [self._imported(response.imported)]
        is_same = response == recorded.response
        data = recorded.data if is_same else response.SerializeToString()
        assert recorded.has_memory == bool(fds)
        socket.send_fds(self._sock, [data], fds)
        for fd in fds:
            os.close(fd)

    def _memory(self, chunk: lane_pb2.Chunk) -> int:
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        fd, mapping = create_chunk(chunk.size, client_writes=is_input, alone=chunk.alone)
        self._chunks[chunk.epoch, chunk.chunk] = mapping
        return fd

    def _imported(self, imported: lane_pb2.Imported) -> int:
        fd, mapping = create_chunk(imported.chunk_size, client_writes=False)
        mapping[: imported.size] = self._shared
        self._chunks[imported.epoch, 0] = mapping
        return fd

    def _elements(self, tensor: tensor_pb2.Tensor) -> bytes:
        if not tensor.HasField("ref"):
            return tensor.raw
        ref = tensor.ref
        return self._chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size]

    def _put(self, elements: bytes, output: tensor_pb2.Tensor) -> None:
        if output.HasField("ref"):
            ref = output.ref
            self._chunks[ref.epoch, ref.chunk][ref.offset : ref.offset + ref.size] = elements
        else:
            output.raw = elements
