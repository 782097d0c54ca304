# SPDX-License-Identifier: Apache-2.0
"""A lane's socket on an event loop: hello, calls by number, packets in and out.

Whoever uses it decides what happens with memory and answers: `aio` for the front, which passes
other people's bytes on, `aio_session` for `AsyncClient`, which shows them as arrays. A call ends
exactly once: with the worker's final response, or when the lane ends.
"""

import asyncio
import mmap
import socket
from abc import ABC, abstractmethod
from typing import Generic, Self, TypeVar

from google.protobuf.message import DecodeError

from thirdrail.errors import ResourceExhausted, Unavailable
from thirdrail.lane import packets
from thirdrail.lane.attach import HELLO_TIMEOUT_S, not_answered, refused
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.outbox import Outbox
from thirdrail.lane.wire import ATTACH_PACKET_BYTES_MAX, VERSION_MAX, VERSION_MIN
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail.weakly import weakly

PACKETS_PER_WAKEUP_MAX = 64
OUTBOX_PACKETS_MAX = 1 << 16

# Keys of LaneRequest's and InferRequest's fields in the wire format: number << 3 | type.
_INFER_KEY = bytes((2 << 3 | 2,))
_FLOW_KEY = bytes((6 << 3 | 0,))
_CALL_KEY = bytes((1 << 3 | 0,))

P = TypeVar("P")  # what is kept of a call in flight


class AsyncWire(ABC, Generic[P]):
    """One session with one worker, as far as the socket goes."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._pending: dict[int, P] = {}
        self._next_call = 1
        self._outbox = Outbox(sock, loop, packets_max=OUTBOX_PACKETS_MAX, fail=weakly(self.close))
        self._attached: asyncio.Future[lane_pb2.Attached] = loop.create_future()
        self._limits = lane_pb2.Limits(packet_bytes=ATTACH_PACKET_BYTES_MAX)
        self.closed: asyncio.Future[str] = loop.create_future()  # done with the reason

    async def _say_hello(self, hello: lane_pb2.Hello) -> Self:
        """Raises CannotAttach when the worker does not answer, or refuses us."""
        self._loop.add_reader(self._sock, self._on_readable)
        hello.version_min, hello.version_max = VERSION_MIN, VERSION_MAX
        try:
            self._outbox.send(lane_pb2.LaneRequest(hello=hello).SerializeToString())
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await asyncio.shield(self._attached)
        except TimeoutError:
            self.close("the worker did not answer the lane's hello")
            raise not_answered(self.closed.result()) from None
        except BaseException:
            self.close("attaching failed")
            raise
        return self

    @property
    def is_closed(self) -> bool:
        return self.closed.done()

    @property
    def calls_in_flight(self) -> int:
        return len(self._pending)

    @property
    def inline_bytes_max(self) -> int:
        """Requests up to this size travel in the packet itself."""
        return self._limits.inline_bytes

    def _begin(self, body: bytes, pending: P, *, flow: int = 0) -> int:
        """Send a serialized InferRequest; its call number, if it has one, is replaced.

        Returns the number, under which `pending` is kept. Raises ResourceExhausted when a limit of
        this lane is reached, Unavailable when it has ended; `pending` is not kept then.
        """
        if self.closed.done():
            raise Unavailable(self.closed.result())
        if len(self._pending) >= self._limits.calls_in_flight:
            raise ResourceExhausted(
                f"{len(self._pending)} calls are in flight on this lane, the most it allows"
            )
        call = self._next_call
        self._next_call += 1
        # A field that comes twice counts as its last value: appending replaces the call number.
        number = _CALL_KEY + packets.varint(call)
        packet = _INFER_KEY + packets.varint(len(body) + len(number)) + body + number
        if flow:
            packet += _FLOW_KEY + packets.varint(flow)
        if len(packet) > self._limits.packet_bytes:
            raise ResourceExhausted(
                f"the request without its tensors has {len(body)} bytes, the lane takes "
                f"{self._limits.packet_bytes}"
            )
        self._pending[call] = pending
        self._outbox.send(packet + self._take_releases(self._limits.packet_bytes - len(packet)))
        return call

    def _cancel(self, call: int) -> None:
        """Its memory stays taken until the worker's final response."""
        if call in self._pending:
            cancel = lane_pb2.LaneRequest(cancel=inference_pb2.Cancel(call=call))
            self._outbox.send(cancel.SerializeToString())

    def close(self, reason: str = "the lane was closed") -> None:
        """End the session. Calls in flight fail with Unavailable."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._loop.remove_reader(self._sock)
        self._outbox.close()
        self._sock.close()
        if not self._attached.done():
            self._attached.set_exception(not_answered(reason))
            self._attached.exception()
        pending, self._pending = self._pending, {}
        self._on_closed(Unavailable(reason), list(pending.values()))

    def _send(self, message: lane_pb2.LaneRequest) -> None:
        self._outbox.send(message.SerializeToString())

    # Receiving

    def _on_readable(self) -> None:
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            if self.closed.done():
                return None
            try:
                packet, fds = packets.receive_with_fds(self._sock, self._limits.packet_bytes)
            except BlockingIOError:
                return None
            except OSError as error:
                return self.close(f"the worker is gone: {error.strerror}")
            except packets.PacketTooLarge as error:
                return self.close(f"the worker broke the lane's rules: {error}")
            if not packet:
                return self.close("the worker is gone")
            try:
                message = lane_pb2.LaneResponse.FromString(packet)
            except DecodeError:
                packets.close_all(fds)
                return self.close("the worker broke the lane's rules: a packet is no LaneResponse")
            self._on_packet(message, fds)
            if not self._pending:
                return None  # nothing more is expected: spare the read that finds nothing

    def _on_packet(self, message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        kind = message.WhichOneof("message")
        if kind == "infer":
            self._on_response(message.infer)
        elif kind == "chunk":
            return self._on_chunk_packet(message.chunk, fds)
        elif kind == "attached":
            self._limits = message.attached.limits
            self._on_attached(message.attached)
            if not self._attached.done():
                self._attached.set_result(message.attached)
        elif kind == "grow_refused":
            self._on_grow_refused(message.grow_refused.message)
        elif kind == "goodbye":
            if not self._attached.done():
                self._attached.set_exception(refused(message.goodbye.status))
            self.close(message.goodbye.status.message)
        else:
            fds = self._on_answer(kind or "", message, fds)
        packets.close_all(fds)  # nobody asked for these

    def _on_chunk_packet(self, chunk: lane_pb2.Chunk, fds: list[int]) -> None:
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        try:
            if self._take_device_chunk(chunk, fds):
                return
            mapping = map_chunk(packets.sole_fd(fds), chunk.size, writable=is_input)
            self._on_chunk(chunk, mapping)
        except (ValueError, OSError) as error:
            self.close(f"the worker sent memory that cannot be used: {error}")

    @abstractmethod
    def _on_attached(self, attached: lane_pb2.Attached) -> None: ...

    @abstractmethod
    def _on_chunk(self, chunk: lane_pb2.Chunk, mapping: mmap.mmap) -> None:
        """Raises ValueError for one that did not come in its turn."""

    def _take_device_chunk(self, chunk: lane_pb2.Chunk, fds: list[int]) -> bool:
        """Whether it is memory on a device. Takes the descriptors over then.

        Raises ValueError like `_on_chunk`.
        """
        return False

    @abstractmethod
    def _on_grow_refused(self, message: str) -> None: ...

    @abstractmethod
    def _on_response(self, response: inference_pb2.InferResponse) -> None: ...

    @abstractmethod
    def _on_closed(self, error: Unavailable, pending: list[P]) -> None:
        """Fail what was in flight, and whoever waits for memory."""

    @abstractmethod
    def _take_releases(self, room: int) -> bytes:
        """Leases to give back beside a packet, in at most `room` bytes."""

    def _on_answer(self, kind: str, message: lane_pb2.LaneResponse, fds: list[int]) -> list[int]:
        """Every other kind. Takes over descriptors, and returns those that it has no use for."""
        return fds
