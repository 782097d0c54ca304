# SPDX-License-Identifier: Apache-2.0
"""The barest client of a lane: says hello and pings, blocking. `thirdrail probe` measures with it.

A ping that refers to memory has the worker copy those bytes into an output slot, so one round trip
of it is what a tensor costs on the lane when nothing is computed.
"""

import mmap
import socket
import struct
from types import TracebackType
from typing import Self

from thirdrail.lane import packets
from thirdrail.lane.attach import not_answered, refused
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.wire import VERSION_MAX, VERSION_MIN
from thirdrail.transport import CannotAttach
from thirdrail.v1 import lane_pb2, tensor_pb2

CLIENT_NAME = "thirdrail probe"
ANSWER_TIMEOUT_S = 5
PACKET_BYTES_MAX = 1 << 20  # a lane's packets are smaller

_TIMEVAL = struct.Struct("@ll")  # of SO_RCVTIMEO: seconds, microseconds


class PingLane:
    """A context manager. Takes over the connected, blocking socket and a fresh token.

    Every method raises CannotAttach when the worker refuses, is silent or breaks the lane's rules.
    """

    def __init__(self, sock: socket.socket, token: bytes) -> None:
        self._sock = sock
        # A timeout of the kernel's, not of Python's, which asks poll(2) before every packet.
        timeout = _TIMEVAL.pack(ANSWER_TIMEOUT_S, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._request = 0
        self._chunks: dict[int, list[mmap.mmap]] = {
            lane_pb2.ARENA_ROLE_INPUT: [],
            lane_pb2.ARENA_ROLE_OUTPUT: [],
        }
        self._leases: list[lane_pb2.Lease] = []
        try:
            hello = lane_pb2.Hello(
                version_min=VERSION_MIN,
                version_max=VERSION_MAX,
                token=token,
                client_name=CLIENT_NAME,
            )
            self._send(lane_pb2.LaneRequest(hello=hello))
            self._input_epoch = self._receive("attached").attached.input_epoch
        except BaseException:
            sock.close()
            raise

    def ping(self) -> None:
        """One round trip without a tensor."""
        self._exchange(None)

    def open_input(self, size: int) -> memoryview:
        """Memory for a tensor of `size` bytes, the only one of this lane; writable."""
        self._send(lane_pb2.LaneRequest(grow=lane_pb2.GrowRequest(size=size)))
        inputs = self._chunks[lane_pb2.ARENA_ROLE_INPUT]
        while not inputs:
            answer = self._receive("chunk", "grow_refused")
            if answer.HasField("grow_refused"):
                raise CannotAttach(answer.grow_refused.message, is_passing=True)
        return memoryview(inputs[0])[:size]

    def echo(self, size: int) -> memoryview:
        """One round trip of the tensor in `open_input`'s memory: the worker's copy, read-only.

        It is valid until the next call.
        """
        ref = self._exchange(tensor_pb2.ArenaRef(epoch=self._input_epoch, size=size))
        self._leases.append(
            lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation)
        )
        outputs = self._chunks[lane_pb2.ARENA_ROLE_OUTPUT]
        if ref.size == size and ref.chunk < len(outputs):
            view = memoryview(outputs[ref.chunk])[ref.offset : ref.offset + size]
            if view.nbytes == size:
                return view
        raise CannotAttach("the worker answered a ping with memory outside its arena")

    def close(self) -> None:
        """Ends the session in good order. Views of its memory stay valid."""
        try:
            self._send(lane_pb2.LaneRequest(close=lane_pb2.Close()))
        except CannotAttach:
            pass  # the worker has gone already
        finally:
            self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, ref: tensor_pb2.ArenaRef | None) -> tensor_pb2.ArenaRef:
        self._request += 1
        ping = lane_pb2.Ping(request=self._request, ref=ref)
        self._send(lane_pb2.LaneRequest(ping=ping, releases=self._leases))
        self._leases.clear()
        pong = self._receive("pong").pong
        if pong.status.reason:
            raise refused(pong.status)
        return pong.ref

    def _send(self, message: lane_pb2.LaneRequest) -> None:
        try:
            packets.send(self._sock, message.SerializeToString())
        except OSError as error:
            raise not_answered(f"the worker is gone: {error.strerror}") from None

    def _receive(self, *kinds: str) -> lane_pb2.LaneResponse:
        """The next message of one of these kinds; chunks on the way are mapped."""
        while True:
            try:
                packet, fds = packets.receive_with_fds(self._sock, PACKET_BYTES_MAX)
            except BlockingIOError:
                raise not_answered(
                    f"the worker did not answer within {ANSWER_TIMEOUT_S} s"
                ) from None
            except (OSError, packets.PacketTooLarge) as error:
                raise not_answered(f"the lane broke: {error}") from None
            if not packet:
                raise not_answered("the worker hung up")
            message = lane_pb2.LaneResponse.FromString(packet)
            kind = message.WhichOneof("message") or ""
            if kind == "goodbye":
                raise refused(message.goodbye.status)
            self._take_memory(message.chunk, fds)
            if kind in kinds:
                return message

    def _take_memory(self, chunk: lane_pb2.Chunk, fds: list[int]) -> None:
        if len(fds) != 1 or chunk.role not in self._chunks:
            packets.close_all(fds)
            return
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        try:
            mapping = map_chunk(fds[0], chunk.size, writable=is_input)
        except (OSError, ValueError) as error:
            raise CannotAttach(f"the worker sent memory that cannot be used: {error}") from None
        self._chunks[chunk.role].append(mapping)
