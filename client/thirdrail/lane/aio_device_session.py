# SPDX-License-Identifier: Apache-2.0
"""A session's part of the worker's device, on an event loop.

What lies where, and what goes back, `device_memory` knows; `aio_device_opening` gets it here. Here
are the waits. Events are given to streams on the loop: that waits for nothing.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import numpy.typing as npt

from thirdrail.device.arrays import DeviceArray, DeviceResult
from thirdrail.device.runtime import Pending
from thirdrail.errors import ThirdrailError
from thirdrail.lane.aio_calls import Answer, Unclaimed
from thirdrail.lane.aio_device_opening import DeviceOpening
from thirdrail.lane.aio_returns import COLLECT_INTERVAL_S
from thirdrail.lane.aio_room import Room
from thirdrail.lane.device_memory import (
    DeviceMemory,
    Inputs,
    Piece,
    Returned,
    device_extent,
)
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.input_arena import COPY_ON_LOOP_BYTES_MAX
from thirdrail.lane.places import Place
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, lane_pb2

LOOK_S = 0.0005  # between two looks at a twin's work; a GPU's is waited for by streams

Call = Callable[[bytes, Mapping[str, Array], Encoder, Unclaimed], Awaitable[Answer]]


class AsyncDeviceSession:
    """Of one session. To be used after `opening.attach`.

    host: the session's memory on the host. room: for asking for chunks.
    send, call, leave: the session's; call: see `AsyncSession.call`. fail: ends the session.
    """

    def __init__(
        self,
        host: SessionMemory,
        room: Room,
        *,
        send: Callable[[lane_pb2.LaneRequest], None],
        call: Call,
        leave: Callable[[list[Place]], None],
        fail: Callable[[str], None],
    ) -> None:
        self._host = host
        self._room = room
        self._send = send
        self._call = call
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._collecting: asyncio.TimerHandle | None = None
        self.opening = DeviceOpening(send, partial(room.grown, None), fail)

    @property
    def memory(self) -> DeviceMemory:
        return self.opening.memory

    # Memory

    async def empty(
        self, shape: Sequence[int] | int, dtype: npt.DTypeLike, stream: int
    ) -> DeviceArray:
        """Raises ResourceExhausted when there is no room, InvalidArgument for text."""
        dims, wanted, nbytes = device_extent(shape, dtype)
        array = self.memory.input_array(await self._reserve(nbytes), dims, wanted, stream)
        self._settle()
        return array

    async def _reserve(self, nbytes: int) -> tuple[int, int]:
        request = lane_pb2.GrowRequest(size=max(nbytes, 1), on_device=True)
        while True:
            await self._room.settle()  # what others ask for may do for us as well
            self.opening.require_open()
            self.collect()
            found = self.memory.chunks.allocate(nbytes)
            if found is not None:
                return found
            await self._room.grow(request)

    def collect(self) -> None:
        """Give back what arrays showed that are gone."""
        for returned in self.memory.take_returned():
            if not self.opening.has_ended:
                with contextlib.suppress(ThirdrailError):  # it goes with the session then
                    self._give_back(returned)

    def _give_back(self, returned: Returned) -> None:
        if isinstance(returned, Piece):
            return self.memory.chunks.allocator.free(returned.chunk, returned.offset)
        self.memory.runtime.record_consumed(returned.place, returned.stream)
        self._send(lane_pb2.LaneRequest(releases=[returned.lease]))
        self.memory.leave_place(returned.place)

    def _settle(self) -> None:
        """Something was shown, or is to go back: look for it, also when nobody asks for more."""
        if self._collecting is None and not self.opening.has_ended and self.memory.is_shown:
            self._collecting = self._loop.call_later(COLLECT_INTERVAL_S, self._on_collect_time)

    def _on_collect_time(self) -> None:
        self._collecting = None
        self.collect()
        self._settle()

    # Requests

    async def infer(
        self,
        head: inference_pb2.InferRequest,
        inputs: Inputs,
        encoder: Encoder,
        *,
        stream: int,
    ) -> DeviceResult:
        """head: the request without its inputs and its place.

        Returns when the device was given the run; what the stream is given then comes after it.
        Raises the request's error, ResourceExhausted where results hold all places.
        """
        self.collect()
        place = head.event_place = self.memory.take_place()
        unclaimed = partial(self._recover, place)
        try:
            arrays = self.memory.take_inputs(head, inputs, stream)
            self.memory.runtime.record_in_ready(place, stream)
        except BaseException:
            unclaimed(None)
            raise
        body = head.SerializeToString()
        response, places = await self._call(body, arrays, encoder, unclaimed)
        try:
            return await self._result_of(response, place, stream)
        finally:
            self._leave(places)

    async def _result_of(
        self, response: inference_pb2.InferResponse, place: int, stream: int
    ) -> DeviceResult:
        try:
            await self.opening.mapped()
        except BaseException:
            self._recover(place, response)
            raise
        result = await self._read(response, place, stream)
        self._settle()
        if result.is_borrowed:
            pending = self.memory.runtime.wait_for_out_done(place, stream)
            if pending is not None:
                await self._wait_for(pending)
        return result

    async def _read(
        self, response: inference_pb2.InferResponse, place: int, stream: int
    ) -> DeviceResult:
        reading = partial(self.memory.result_of, response, place, stream, self._host)
        on_device = self.memory.chunks.output_epoch
        sizes = (each.ref.size for each in response.outputs if each.ref.epoch != on_device)
        if sum(sizes) <= COPY_ON_LOOP_BYTES_MAX:
            return reading()
        # One that is cancelled goes on, and what it made goes back once it is there.
        beside = self._loop.run_in_executor(None, reading)
        beside.add_done_callback(lambda done: done.cancelled() or done.exception())
        beside.add_done_callback(lambda _: self._settle())
        return await asyncio.shield(beside)

    async def _wait_for(self, pending: Pending) -> None:
        """Raises why the session ends meanwhile: a worker may die with its work undone."""
        while not pending.is_set():
            self.opening.require_open()
            await asyncio.sleep(LOOK_S)

    def _recover(self, place: int, response: inference_pb2.InferResponse | None) -> None:
        """See Unclaimed."""
        self.memory.recover(response, place, self._host)
        self._leave([])  # what goes back on the host
        self._settle()

    def close(self, error: ThirdrailError) -> None:
        """The session has ended: whoever waits, fails. What is mapped stays with its arrays."""
        self.opening.close(error)
        if self._collecting is not None:
            self._collecting.cancel()
