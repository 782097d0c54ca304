# SPDX-License-Identifier: Apache-2.0
"""The client's end of a lane on asyncio: many calls in flight, answers matched by number.

The front is its first user. A call ends exactly once: with the worker's final response, or with
Unavailable when the lane ends first. A cancelled call keeps its number and its input memory until
the worker's final response says that nobody reads them any more.
"""

import asyncio
import contextlib
import functools
import mmap
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thirdrail.dtypes import Buffer
from thirdrail.errors import Internal, ThirdrailError, Unavailable
from thirdrail.failures import anew
from thirdrail.lane import packets
from thirdrail.lane.aio_wire import AsyncWire
from thirdrail.lane.input_arena import InputArena, Piece, bytes_of, size_of
from thirdrail.transport import CannotAttach
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2

FEATURES: tuple[str, ...] = ()

_RELEASE_KEY = bytes((5 << 3 | 2,))  # of LaneRequest's field in the wire format: number << 3 | type


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


OnReply = Callable[[Reply | ThirdrailError], None]


@dataclass(slots=True)
class _Pending:
    on_reply: OnReply
    inputs: list[tensor_pb2.ArenaRef]


class AsyncLane(AsyncWire[_Pending]):
    """One session with one worker. Use `AsyncLane.attach(sock)`."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(sock, loop)
        self._releases: list[bytes] = []
        self._output_epoch = 0
        self._output_chunks: list[memoryview] = []
        self._input: InputArena | None = None

    @classmethod
    async def attach(cls, sock: socket.socket) -> "AsyncLane":
        """Say hello on a connected socket, which the lane then owns.

        Raises Unavailable when the worker does not answer, or refuses us.
        """
        lane = cls(sock, asyncio.get_running_loop())
        try:
            return await lane._say_hello(lane_pb2.Hello(features=FEATURES))
        except CannotAttach as why:
            raise Unavailable(why.reason) from None

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
        future: asyncio.Future[Reply] = self._loop.create_future()
        pending = _Pending(functools.partial(_settle, future), list(refs or ()))
        call = self._begin(body, pending, flow=flow)
        if refs is not None:
            refs.clear()
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel(call)
            if not future.cancelled():  # the reply came in the same turn, and nobody reads it
                with contextlib.suppress(ThirdrailError):
                    future.result().release()
            raise
        finally:
            # An error has this frame: with the error in it, a cycle that keeps whole requests.
            del future, pending

    def start(self, body: bytes, on_reply: OnReply, *, flow: int = 0) -> int:
        """The same for those who need not wait: `on_reply` is called once, with the reply or with
        what there is in place of one, and must not raise. Returns the number for `cancel`."""
        return self._begin(body, _Pending(on_reply, []), flow=flow)

    def cancel(self, call: int) -> None:
        """Ask the worker to end a call that was started. Its reply says whether it did."""
        self._cancel(call)

    def _on_closed(self, error: Unavailable, pending: list[_Pending]) -> None:
        if self._input is not None:
            self._input.close(error)
        self._output_chunks.clear()  # replies that were not released keep theirs
        for entry in pending:
            entry.on_reply(anew(error))

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

    def _on_attached(self, attached: lane_pb2.Attached) -> None:
        self._output_epoch = attached.output_epoch
        self._input = InputArena(
            attached.input_epoch, attached.limits.input_arena_bytes, self._request_growth
        )

    def _request_growth(self, size: int) -> None:
        self._send(lane_pb2.LaneRequest(grow=lane_pb2.GrowRequest(size=size)))

    def _on_chunk(self, chunk: lane_pb2.Chunk, mapping: mmap.mmap) -> None:
        if chunk.role == lane_pb2.ARENA_ROLE_INPUT and self._input is not None:
            self._input.grown(mapping)
        else:
            self._output_chunks.append(memoryview(mapping))

    def _on_grow_refused(self, message: str) -> None:
        if self._input is not None:
            self._input.refused(message)

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
        if None in data and any(t.WhichOneof("data") == "ref" for t in response.outputs):
            reply.release()
            return pending.on_reply(Internal("the worker referred to memory outside its arena"))
        pending.on_reply(reply)

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


def _settle(future: asyncio.Future[Reply], outcome: Reply | ThirdrailError) -> None:
    if isinstance(outcome, ThirdrailError):
        if not future.done():
            future.set_exception(outcome)
    elif future.done():  # cancelled: nobody reads it
        outcome.release()
    else:
        future.set_result(outcome)
