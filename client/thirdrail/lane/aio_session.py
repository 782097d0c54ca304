# SPDX-License-Identifier: Apache-2.0
"""A client's session on an event loop: calls with arrays, in the session's own memory or copied.

What the memory means is decided in `session_memory`, `encoding` and `results`, which the blocking
client uses as well; here are the waits. Everything runs on
the loop's thread, but for copies of more than COPY_ON_LOOP_BYTES_MAX.
"""

import asyncio
import contextlib
import mmap
import socket
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from thirdrail.dtypes import extent
from thirdrail.errors import Cancelled, ThirdrailError, Unavailable
from thirdrail.failures import WAS_CLOSED, with_note
from thirdrail.lane import forks, packets
from thirdrail.lane.aio_calls import Answer, AsyncCall, Unclaimed
from thirdrail.lane.aio_device_session import AsyncDeviceSession
from thirdrail.lane.aio_exports import AsyncExports
from thirdrail.lane.aio_returns import Returns
from thirdrail.lane.aio_room import Room
from thirdrail.lane.aio_wire import AsyncWire
from thirdrail.lane.calls import NotSent
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.input_arena import COPY_ON_LOOP_BYTES_MAX
from thirdrail.lane.places import Place, Role
from thirdrail.lane.results import borrowed_result, private_result, release_outputs
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.lane.wire import DEBUG_FEATURE, DEVICE_FEATURE
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail.weakly import weakly


class AsyncSession(AsyncWire[AsyncCall]):
    """Use `await AsyncSession.open(...)`; it ends by `leave`, or when `closed` is done."""

    def __init__(
        self, sock: socket.socket, loop: asyncio.AbstractEventLoop, *, is_debug: bool
    ) -> None:
        super().__init__(sock, loop)
        self._is_debug = is_debug
        self._is_leaving = False
        self._prepare(lane_pb2.Attached())

    @classmethod
    async def open(
        cls, sock: socket.socket, token: bytes, client_name: str, *, is_debug: bool = False
    ) -> "AsyncSession":
        """Attach by a socket, which the session then owns. Raises CannotAttach."""
        session = cls(sock, asyncio.get_running_loop(), is_debug=is_debug)
        features = [DEVICE_FEATURE, DEBUG_FEATURE] if is_debug else [DEVICE_FEATURE]
        forks.forget_in_children(session)
        hello = lane_pb2.Hello(token=token, client_name=client_name, features=features)
        return await session._say_hello(hello)

    @property
    def memory_held(self) -> tuple[int, int]:
        """Bytes of input memory that arrays and calls use, and how many results arrays show."""
        return self._memory.input_bytes_used, self._memory.shown.count(Role.OUTPUT)

    async def infer(
        self, head: bytes, arrays: Mapping[str, Array], encoder: Encoder, *, borrow: bool
    ) -> Result:
        """Call a model. See `call`. Raises the request's error, too."""
        response, places = await self.call(head, arrays, encoder, self._unclaimed)
        return await self._result(response, places, borrow=borrow)

    async def call(
        self, head: bytes, arrays: Mapping[str, Array], encoder: Encoder, unclaimed: Unclaimed
    ) -> Answer:
        """The answer, and the input memory of the call, which is then the caller's to leave.

        head: the request before its inputs, as `encoder.options` wrote it.
        unclaimed: called where this raises, with the answer when it comes; not when none comes.
        Waits while the session has as many calls in flight as it may, or no room for the inputs.
        Raises ResourceExhausted where waiting cannot help, NotSent when the session has ended
        before the worker heard of the call, Unavailable when it ends afterwards.
        """
        call = AsyncCall(self._loop.create_future(), unclaimed)
        try:
            number = await self._send_call(call, head, arrays, encoder)
        except BaseException:
            unclaimed(None)
            raise
        places, answer = call.places, self._response(number, call)
        del call  # see _response
        return await answer, places

    async def _send_call(
        self, call: AsyncCall, head: bytes, arrays: Mapping[str, Array], encoder: Encoder
    ) -> int:
        """Returns its number."""
        if self._memory.shown.has_collected:
            self._returns.collect()
        parts, large = encoder.inputs(arrays, self._limits.inline_bytes)
        await self._slots.acquire()
        try:
            if large:
                parts += await self._room.refer(large, call.places, call.checksums)
            if self.is_closed:
                raise self._not_sent()
            number = self._begin(b"".join((head, *parts)), call)
        except BaseException:
            self._slots.release()
            self._returns.leave(call.places)
            raise
        if call.future.done():  # the socket did not take it
            raise self._not_sent() from call.future.exception()
        return number

    async def _response(self, number: int, call: AsyncCall) -> inference_pb2.InferResponse:
        future = call.future
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._cancel(number)
            elif future.exception() is None:  # it came in the very moment
                call.unclaimed(future.result())
                self._leave(call.places)
            raise
        finally:
            # An error's traceback has our frames; one of them with the error in it would keep the
            # caller's arrays until the collector comes by.
            del future, call

    def _unclaimed(self, response: inference_pb2.InferResponse | None) -> None:
        """Nobody takes this answer."""
        if response is not None:
            release_outputs(response, self._memory)

    async def empty(
        self, shape: Sequence[int] | int, dtype: npt.DTypeLike, *, alone: bool
    ) -> Array:
        """An array to fill in and send without a copy; its memory goes back with its last view.

        alone: in memory that can be exported.
        Raises ResourceExhausted when there is no room, NotSent when the session has ended.
        """
        shape, wanted, nbytes = extent(shape, dtype)
        if wanted.hasobject or nbytes <= (0 if alone else self._limits.inline_bytes):
            return np.empty(shape, wanted)  # it travels in the packet
        if alone:
            place = await self._reserve_alone(nbytes)
            place.size = nbytes  # the rest of its pages is no part of the tensor
        else:
            [place] = await self._room.reserve([nbytes])
        shown = self._memory.shown.show(place, writable=True)
        self._returns.settle()
        array: Array = shown[:nbytes].view(wanted).reshape(shape)
        return array

    async def _reserve_alone(self, size: int) -> Place:
        """A chunk for one tensor. Raises like `empty`."""
        self._returns.collect()
        self._returns.flush()  # there may be so many such chunks and no more
        place = await self._room.grow(lane_pb2.GrowRequest(size=size, alone=True))
        assert place is not None
        return place

    def leave(self) -> None:
        """End the session in good order. Calls in flight fail with Cancelled; arrays stay valid."""
        if self.is_closed:
            return
        self._is_leaving = True
        # Also with arrays that somebody has yet: the worker would count them until we exit.
        goodbye = lane_pb2.LaneRequest(close=lane_pb2.Close()).SerializeToString()
        with contextlib.suppress(OSError):
            packets.send(self._sock, goodbye)
        with contextlib.suppress(RuntimeError):  # a loop that has ended wakes nobody
            self.close(WAS_CLOSED)

    def forget(self) -> None:
        """In a forked child: the session is the parent's, whose death the worker must see."""
        self._sock.close()

    # Outputs

    async def _result(
        self, response: inference_pb2.InferResponse, places: list[Place], *, borrow: bool
    ) -> Result:
        """places: of the call, which go back when its result is the caller's. If they went back as
        it came, calls would be sent, and results come, faster than they are copied.
        """
        try:
            if borrow:
                return borrowed_result(response, self._memory, self._returns.give_back)
            size = sum(tensor.ref.size for tensor in response.outputs)
            if size <= COPY_ON_LOOP_BYTES_MAX:
                return private_result(response, self._memory)
            # A copy that is cancelled goes on, and gives its slots back at its end.
            copying = self._loop.run_in_executor(None, private_result, response, self._memory)
            copying.add_done_callback(lambda done: done.cancelled() or done.exception())
            copying.add_done_callback(partial(self._leave, places))
            places = []
            return await asyncio.shield(copying)
        finally:
            self._leave(places)
            self._returns.settle()

    def _leave(self, places: list[Place], _copied: object = None) -> None:
        self._returns.leave(places)
        self._returns.flush_soon()

    def _take_releases(self, room: int) -> bytes:
        return self._returns.take(room)

    # Receiving

    def _on_attached(self, attached: lane_pb2.Attached) -> None:
        self._prepare(attached)

    def _prepare(self, attached: lane_pb2.Attached) -> None:
        self._memory = SessionMemory(attached, is_debug=self._is_debug)
        self._returns = returns = Returns(
            self._memory,
            self._outbox.send,
            self._limits.packet_bytes,
            on_freed=weakly(self._on_freed),
        )
        self._room = Room(
            self._memory,
            weakly(self._request_growth),
            returns.collect,
            returns.leave,
            is_debug=self._is_debug,
        )
        self._slots = asyncio.Semaphore(attached.limits.calls_in_flight)
        self.exports = AsyncExports(
            self._memory,
            send=weakly(self._send),
            reserve_alone=weakly(self._reserve_alone),
            leave=returns.leave,
            give_back=returns.give_back,
            settle=returns.settle,
        )
        self.device = AsyncDeviceSession(
            self._memory,
            self._room,
            send=weakly(self._send),
            call=weakly(self.call),
            leave=weakly(self._leave),
            fail=weakly(self.close),
        )

    def _on_freed(self) -> None:
        self._room.wake()

    def _request_growth(self, request: lane_pb2.GrowRequest) -> None:
        self._send(lane_pb2.LaneRequest(grow=request))

    def _on_answer(self, kind: str, message: lane_pb2.LaneResponse, fds: list[int]) -> list[int]:
        if kind == "device_attached":
            return self.device.opening.on_attached(message.device_attached, fds)
        return self.exports.on_answer(kind, message, fds)

    def _on_chunk(self, chunk: lane_pb2.Chunk, mapping: mmap.mmap) -> None:
        place = self._memory.add_chunk(chunk, np.frombuffer(mapping, np.uint8))
        if chunk.role == lane_pb2.ARENA_ROLE_INPUT:
            self._room.grown(place)

    def _take_device_chunk(self, chunk: lane_pb2.Chunk, fds: list[int]) -> bool:
        if not self.device.opening.takes(chunk):
            return False
        self.device.opening.on_chunk(chunk, fds)
        return True

    def _on_grow_refused(self, message: str) -> None:
        self._room.refused(message)

    def _on_response(self, response: inference_pb2.InferResponse) -> None:
        call = self._pending.pop(response.call, None) if response.final else None
        if call is None:
            release_outputs(response, self._memory)
            return self._returns.flush_soon()
        self._slots.release()
        if not call.answer(response):
            self._leave(call.places)

    def _on_closed(self, error: Unavailable, pending: list[AsyncCall]) -> None:
        self._returns.close()
        self._room.close(self._not_sent())
        self.exports.close(self._not_sent())
        self.device.close(self._not_sent())
        for call in pending:
            self._slots.release()
            if not call.future.done():
                if self._is_leaving:
                    call.future.set_exception(Cancelled(error.message))
                else:
                    call.future.set_exception(with_note(Unavailable(error.message)))

    def _not_sent(self) -> ThirdrailError:
        reason = self.closed.result()
        return Cancelled(reason) if self._is_leaving else with_note(NotSent(reason))
