# SPDX-License-Identifier: Apache-2.0
"""The client's end of a lane on asyncio: many calls in flight, answers matched by number.

The front is its first user. A call ends exactly once: with the worker's final response, or with
Unavailable when the lane ends first. A cancelled call keeps its number and its input memory until
the worker's final response says that nobody reads them any more.
"""

import asyncio
import contextlib
import mmap
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from thirdrail.dtypes import Buffer
from thirdrail.errors import Internal, ResourceExhausted, Unavailable
from thirdrail.lane import packets
from thirdrail.lane.input_arena import InputArena, Piece, bytes_of, size_of
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2

VERSION_MIN = 1
VERSION_MAX = 1
FEATURES: tuple[str, ...] = ()

HELLO_TIMEOUT_S = 10.0
PACKETS_PER_WAKEUP_MAX = 64
OUTBOX_PACKETS_MAX = 1 << 16
ATTACH_PACKET_BYTES_MAX = 1 << 16  # until the worker has told its limit

# Keys of LaneRequest's and InferRequest's fields in the wire format: number << 3 | type.
_INFER_KEY = bytes((2 << 3 | 2,))
_RELEASE_KEY = bytes((5 << 3 | 2,))
_FLOW_KEY = bytes((6 << 3 | 0,))
_CALL_KEY = bytes((1 << 3 | 0,))


@dataclass(slots=True)
class Reply:
    """A final response and the bytes of its outputs, which stay valid until `release`."""

    response: inference_pb2.InferResponse
    data: list[Buffer | None]  # per output; None: it came as values
    _lane: "AsyncLane | None" = None
    _leases: list[lane_pb2.Lease] = field(default_factory=list)

    def release(self) -> None:
        """Give the output memory back. Do it once, after the bytes were used."""
        if self._lane is not None:
            self.data.clear()
            self._lane._release(self._leases)
            self._lane = None


@dataclass(slots=True)
class _Pending:
    future: asyncio.Future[Reply]
    inputs: list[tensor_pb2.ArenaRef]


class AsyncLane:
    """One session with one worker. Use `AsyncLane.attach(sock)`."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._pending: dict[int, _Pending] = {}
        self._next_call = 1
        self._outbox = Outbox(sock, loop, packets_max=OUTBOX_PACKETS_MAX, fail=self.close)
        self._releases: list[bytes] = []
        self._attached: asyncio.Future[lane_pb2.Attached] = loop.create_future()
        self._output_epoch = 0
        self._output_chunks: list[memoryview] = []
        self._limits = lane_pb2.Limits(packet_bytes=ATTACH_PACKET_BYTES_MAX)
        self._input: InputArena | None = None
        self.closed: asyncio.Future[str] = loop.create_future()  # done with the reason

    @classmethod
    async def attach(cls, sock: socket.socket) -> "AsyncLane":
        """Say hello on a connected socket, which the lane then owns.

        Raises Unavailable when the worker does not answer, or refuses us.
        """
        lane = cls(sock, asyncio.get_running_loop())
        lane._loop.add_reader(sock, lane._on_readable)
        hello = lane_pb2.Hello(version_min=VERSION_MIN, version_max=VERSION_MAX, features=FEATURES)
        try:
            lane._outbox.send(lane_pb2.LaneRequest(hello=hello).SerializeToString())
            await asyncio.wait_for(asyncio.shield(lane._attached), HELLO_TIMEOUT_S)
        except TimeoutError:
            lane.close("the worker did not answer the lane's hello")
            raise Unavailable("the worker did not answer the lane's hello") from None
        except BaseException:
            lane.close("attaching failed")
            raise
        return lane

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

    async def call(
        self,
        request: inference_pb2.InferRequest,
        data: Sequence[Piece | None] = (),
        *,
        flow: int = 0,
    ) -> Reply:
        """Send a request and wait for its final response, which may be a failure.

        data: the bytes of the inputs that do not have theirs in `request`, which is completed in
            place.
        flow: which of our own callers this is.
        Raises ResourceExhausted when a limit of this lane is reached, Unavailable when the lane
        ends, and what an input's source raises.
        """
        refs: list[tensor_pb2.ArenaRef] = []
        try:
            await self._place(request, data, refs)
            return await self.call_bytes(request.SerializeToString(), refs, flow=flow)
        except BaseException:
            self._free_inputs(refs)
            raise

    async def _place(
        self,
        request: inference_pb2.InferRequest,
        data: Sequence[Piece | None],
        refs: list[tensor_pb2.ArenaRef],
    ) -> None:
        if not data:
            return
        inline_left = self._limits.inline_bytes
        large: list[tuple[tensor_pb2.Tensor, Piece]] = []
        for tensor, piece in zip(request.inputs, data, strict=True):
            if piece is None:
                continue
            size = size_of(piece)
            if size <= inline_left:
                inline_left -= size
                tensor.raw = bytes_of(piece)
            else:
                large.append((tensor, piece))
        if large:
            assert self._input is not None
            refs += await self._input.place([piece for _, piece in large])
            for (tensor, _), ref in zip(large, refs, strict=True):
                tensor.ref.CopyFrom(ref)

    async def call_bytes(
        self, body: bytes, refs: list[tensor_pb2.ArenaRef] | None = None, *, flow: int = 0
    ) -> Reply:
        """The same for a serialized InferRequest; its call number, if it has one, is replaced.

        refs: the input memory that the request refers to; emptied, it then belongs to the call.
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
        pending = _Pending(self._loop.create_future(), list(refs or ()))
        self._pending[call] = pending
        if refs is not None:
            refs.clear()
        self._outbox.send(packet + self._take_releases(self._limits.packet_bytes - len(packet)))
        try:
            return await pending.future
        except asyncio.CancelledError:
            if call in self._pending:
                cancel = lane_pb2.LaneRequest(cancel=inference_pb2.Cancel(call=call))
                self._outbox.send(cancel.SerializeToString())
            raise

    def close(self, reason: str = "the lane was closed") -> None:
        """End the session. Calls in flight fail with Unavailable."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._loop.remove_reader(self._sock)
        self._outbox.close()
        self._sock.close()
        error = Unavailable(reason)
        if not self._attached.done():
            self._attached.set_exception(error)
            self._attached.exception()
        if self._input is not None:
            self._input.close(error)
        self._output_chunks.clear()  # replies that were not released keep theirs
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            if not entry.future.done():
                entry.future.set_exception(error)

    # Giving memory back

    def _release(self, leases: list[lane_pb2.Lease]) -> None:
        """Note leases to give back: with the next packet, or soon by themselves."""
        if not leases or self.closed.done():
            return
        if not self._releases:
            self._loop.call_soon(self._flush_releases)
        for lease in leases:
            body = lease.SerializeToString()
            self._releases.append(_RELEASE_KEY + packets.varint(len(body)) + body)

    def _flush_releases(self) -> None:
        while self._releases:
            self._outbox.send(self._take_releases(self._limits.packet_bytes))

    def _take_releases(self, room: int) -> bytes:
        if not self._releases:
            return b""
        count = max(1, room // 64) if room >= 64 else 0  # a lease takes at most 22 bytes
        taken, self._releases = self._releases[:count], self._releases[count:]
        return b"".join(taken)

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
            self._on_packet(lane_pb2.LaneResponse.FromString(packet), fds)
            if not self._pending:
                return None  # nothing more is expected: spare the read that finds nothing

    def _on_packet(self, message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        kind = message.WhichOneof("message")
        if kind == "infer":
            self._on_response(message.infer)
        elif kind == "chunk":
            self._on_chunk(message.chunk, fds)
        elif kind == "attached":
            self._on_attached(message.attached)
        elif kind == "grow_refused" and self._input is not None:
            self._input.refused(message.grow_refused.message)
        elif kind == "goodbye":
            self.close(message.goodbye.status.message)

    def _on_attached(self, attached: lane_pb2.Attached) -> None:
        self._limits = attached.limits
        self._output_epoch = attached.output_epoch
        self._input = InputArena(
            attached.input_epoch, attached.limits.input_arena_bytes, self._request_growth
        )
        if not self._attached.done():
            self._attached.set_result(attached)

    def _request_growth(self, size: int) -> None:
        grow = lane_pb2.GrowRequest(size=size)
        self._outbox.send(lane_pb2.LaneRequest(grow=grow).SerializeToString())

    def _on_chunk(self, chunk: lane_pb2.Chunk, fds: list[int]) -> None:
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        try:
            (fd,) = fds
            mapping: mmap.mmap = map_chunk(fd, chunk.size, writable=is_input)
        except (ValueError, OSError) as error:
            return self.close(f"the worker sent memory that cannot be used: {error}")
        if is_input and self._input is not None:
            self._input.grown(mapping)
        else:
            self._output_chunks.append(memoryview(mapping))

    def _on_response(self, response: inference_pb2.InferResponse) -> None:
        leases: list[lane_pb2.Lease] = []
        data = [self._bytes_of(tensor, leases) for tensor in response.outputs]
        reply = Reply(response, data, self, leases)
        if not response.final:
            # This version asks for no partial responses; a model that sends them is refused at
            # load.
            return reply.release()
        pending = self._pending.pop(response.call, None)
        if pending is None:
            return reply.release()
        self._free_inputs(pending.inputs)
        if pending.future.done():
            return reply.release()
        if None in data and any(t.WhichOneof("data") == "ref" for t in response.outputs):
            pending.future.set_exception(
                Internal("the worker referred to memory outside its arena")
            )
            return reply.release()
        pending.future.set_result(reply)

    def _bytes_of(self, tensor: tensor_pb2.Tensor, leases: list[lane_pb2.Lease]) -> Buffer | None:
        form = tensor.WhichOneof("data")
        if form == "raw":
            return tensor.raw
        if form != "ref":
            return None
        ref = tensor.ref
        leases.append(lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation))
        with contextlib.suppress(IndexError):
            view = self._output_chunks[ref.chunk][ref.offset : ref.offset + ref.size]
            if view.nbytes == ref.size and ref.epoch == self._output_epoch:
                return view
        return None

    def _free_inputs(self, refs: list[tensor_pb2.ArenaRef]) -> None:
        for ref in refs:
            assert self._input is not None
            self._input.free(ref)
        refs.clear()
