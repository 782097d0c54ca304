# SPDX-License-Identifier: Apache-2.0
"""A lane's client that exports and imports, message by message."""

import itertools
import os
import socket
from typing import Any

from support.lane_peer import PACKET_BYTES_MAX, LanePeer, Request, Response
from thirdrail import dtypes
from thirdrail.lane.memory import map_chunk
from thirdrail.tensors import Array, array_of_bytes
from thirdrail.v1 import lane_pb2, tensor_pb2

Ref = tensor_pb2.ArenaRef


class HandOverPeer(LanePeer):
    """told: epochs that the worker said were revoked, as they came."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.told: list[int] = []
        self.imported_inodes: dict[int, int] = {}  # by epoch
        self._numbers = itertools.count(1)

    @classmethod
    def adopt(cls, peer: LanePeer) -> "HandOverPeer":
        """One that has attached already."""
        adopted = cls(peer.sock)
        adopted.attachment = peer.attachment
        return adopted

    def receive(self) -> Response:
        """As LanePeer's; maps what was imported, too."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.sock, PACKET_BYTES_MAX, 4)
        except ConnectionResetError:
            raise EOFError from None
        if not packet:
            raise EOFError
        response = Response.FromString(packet)
        kind = response.WhichOneof("message")
        if kind == "chunk":
            chunk, (fd,) = response.chunk, fds
            writable = chunk.role == lane_pb2.ARENA_ROLE_INPUT
            self.chunks[chunk.epoch, chunk.chunk] = map_chunk(fd, chunk.size, writable=writable)
        elif kind == "imported" and not response.imported.status.reason:
            (fd,) = fds
            self.on_imported(response.imported, fd)
        else:
            assert not fds
        return response

    def on_imported(self, imported: lane_pb2.Imported, fd: int) -> None:
        self.imported_inodes[imported.epoch] = os.fstat(fd).st_ino
        mapping = map_chunk(fd, imported.chunk_size, writable=False)
        self.chunks[imported.epoch, 0] = mapping

    def ask(self, kind: str, **fields: Any) -> Any:
        """The answer to a message of this kind, past others."""
        request = Request()
        getattr(request, kind).SetInParent()
        for name, value in fields.items():
            if isinstance(value, Ref):
                getattr(getattr(request, kind), name).CopyFrom(value)
            elif name == "shape":
                getattr(request, kind).shape.extend(value)
            else:
                setattr(getattr(request, kind), name, value)
        number = next(self._numbers)
        getattr(request, kind).request = number
        self.send(request)
        while True:
            response = self.receive()
            answer = getattr(response, response.WhichOneof("message") or "")
            if isinstance(answer, lane_pb2.Revoked) and answer.epoch:
                self.told.append(answer.epoch)
            elif getattr(answer, "request", 0) == number:
                return answer

    def alone(self, array: Array) -> Ref:
        """The array in a chunk of its own."""
        return self.place(self.grow(array.nbytes, alone=True), array)

    def export(self, ref: Ref, array: Array, **fields: Any) -> lane_pb2.Exported:
        """array: for its type and shape."""
        fields = {
            "ref": ref,
            "data_type": dtypes.dtype_of_array(array).value,
            "shape": array.shape,
        } | fields
        exported: lane_pb2.Exported = self.ask("export_tensor", **fields)
        return exported

    def take(self, token: bytes) -> lane_pb2.Imported:
        imported: lane_pb2.Imported = self.ask("import_tensor", token=token)
        return imported

    def array_of(self, imported: lane_pb2.Imported) -> Array:
        """A view of an imported tensor."""
        dtype = dtypes.dtype_of_value(imported.data_type)
        data = memoryview(self.chunks[imported.epoch, 0])[: imported.size]
        return array_of_bytes("imported", dtype, imported.shape, data)

    def drop(self, epoch: int, chunk: int = 0) -> None:
        self.chunks.pop((epoch, chunk), None)
        self.send(Request(drop=lane_pb2.DropRequest(epoch=epoch, chunk=chunk)))

    def end(self) -> None:
        """In good order."""
        self.send(Request(close=lane_pb2.Close()))
        self.chunks.clear()
        self.sock.close()


def ref_to(imported: lane_pb2.Imported) -> Ref:
    return Ref(epoch=imported.epoch, size=imported.size)
