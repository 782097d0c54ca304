# SPDX-License-Identifier: Apache-2.0
"""A session's part of the worker's device, for threads: what is asked for, sent and waited for.

What lies where, and what goes back, `device_memory` knows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy.typing as npt

from thirdrail.device.arrays import DeviceArray, DeviceResult
from thirdrail.device.runtime import Pending
from thirdrail.errors import ThirdrailError, TimedOut
from thirdrail.failures import anew
from thirdrail.lane.calls import Call, timed_out
from thirdrail.lane.conversation import Conversation
from thirdrail.lane.device_chunks import open_device
from thirdrail.lane.device_memory import (
    ATTACH_TIMEOUT_S,
    DeviceMemory,
    Inputs,
    Slot,
    device_extent,
)
from thirdrail.lane.packets import close_all
from thirdrail.v1 import inference_pb2, lane_pb2

if TYPE_CHECKING:
    from thirdrail.lane.blocking import BlockingLane

EMPTY_TIMEOUT_S = 30.0  # as on the host
LOOK_S = 0.05  # between two looks whether the worker lives, whose work is waited for


def attach(talk: Conversation, uuid: str) -> DeviceMemory | ThirdrailError:
    """Ask the lane's worker for its device, which it gives once in a session.

    Returns why this process cannot use it where it was given in vain. Raises FailedPrecondition
    where there is none to get, InvalidArgument for another device.
    """
    made: list[DeviceMemory | ThirdrailError] = []

    def on_answer(message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        """Before the reader goes on: what it reads next may be a chunk."""
        attached = message.device_attached
        if attached.status.reason:
            return close_all(fds)
        try:
            chunks = talk.device_chunks = open_device(attached, fds)
        except ThirdrailError as error:
            return made.append(error)
        made.append(DeviceMemory(attached, chunks))

    request = lane_pb2.LaneRequest(device=lane_pb2.DeviceRequest(uuid=uuid))
    talk.questions.ask(request, ATTACH_TIMEOUT_S, on_answer)
    (outcome,) = made
    return outcome


class DeviceSession:
    """memory: what `attach` gave. Safe to use from several threads.

    The lane keeps the memory and none of these, which keep the lane: it would end with the garbage
    collector only.
    """

    def __init__(self, lane: "BlockingLane", memory: DeviceMemory) -> None:
        self.memory = memory
        self._lane = lane
        self._talk = lane.talk

    # Memory

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike, stream: int) -> DeviceArray:
        """Raises ResourceExhausted when there is no room, InvalidArgument for text."""
        dims, wanted, nbytes = device_extent(shape, dtype)
        self.collect()
        deadline_s = time.monotonic() + EMPTY_TIMEOUT_S
        piece = self._talk.placer.reserve_on_device(
            nbytes, lambda: self.memory.chunks.allocate(nbytes), deadline_s, EMPTY_TIMEOUT_S
        )
        return self.memory.input_array(piece, dims, wanted, stream)

    def collect(self) -> None:
        """Give back what arrays showed that are gone."""
        for returned in self.memory.take_returned():
            if isinstance(returned, Slot):
                try:
                    self._release(returned)
                except TimedOut:  # the worker is busy: next time, then
                    return self.memory.put_back(returned)
                except ThirdrailError:
                    continue  # it goes with the session
            else:
                with self._talk.lock:
                    self.memory.chunks.allocator.free(returned.chunk, returned.offset)

    def _release(self, slot: Slot) -> None:
        self.memory.runtime.record_consumed(slot.place, slot.stream)
        self._talk.send(lane_pb2.LaneRequest(releases=[slot.lease]), 0.0)
        self.memory.leave_place(slot.place)

    # Requests

    def infer(
        self,
        head: inference_pb2.InferRequest,
        inputs: Inputs,
        *,
        stream: int,
        timeout: float | None,
    ) -> DeviceResult:
        """head: the request without its inputs and its place.

        Returns when the device was given the run; what the stream is given then comes after it.
        Raises the request's error, TimedOut, ResourceExhausted where results hold all places.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        self.collect()
        held = _HeldPlace(self.memory.take_place())
        head.event_place = held.place
        call = Call(borrow=False)
        call.on_done = lambda: self._recover(call, held) if call.is_abandoned else None
        try:
            body = self._body(call, head, inputs, stream, deadline_s, timeout)
            self.memory.runtime.record_in_ready(held.place, stream)
            self._talk.send_call(call, body, deadline_s, timeout)
        except BaseException:
            self._talk.withdraw(call)
            self.memory.leave_place(held.place)
            raise
        try:
            in_time = self._talk.turns.wait(call, deadline_s)
        except BaseException:
            self._abandon(call, held)
            raise
        if not in_time:
            self._abandon(call, held)
            raise timed_out(timeout)
        if call.error is not None:  # the lane has ended, or the result is worth nothing
            self._recover(call, held)
            raise call.error
        return self._result_of(call, held.place, stream)

    def _abandon(self, call: Call, held: "_HeldPlace") -> None:
        self._talk.abandon(call)
        if call.is_done:
            self._recover(call, held)

    def _recover(self, call: Call, held: "_HeldPlace") -> None:
        """An answer came that nobody takes. By whoever reads, or by whoever gave the call up."""
        if held.let_go():
            # What an abandoned call has on the host has gone back.
            host = None if call.is_abandoned else self._talk.memory
            self.memory.recover(call.response, held.place, host)

    def _body(
        self,
        call: Call,
        head: inference_pb2.InferRequest,
        inputs: Inputs,
        stream: int,
        deadline_s: float | None,
        timeout: float | None,
    ) -> bytes:
        arrays = self.memory.take_inputs(head, inputs, stream)
        parts, large = self._lane.encode(arrays)
        if large:
            parts += self._talk.placer.place(call, large, deadline_s, timeout)
        return b"".join((head.SerializeToString(), *parts))

    def _result_of(self, call: Call, place: int, stream: int) -> DeviceResult:
        response = call.response
        assert response is not None
        result = self.memory.result_of(response, place, stream, self._talk.memory)
        if result.is_borrowed:
            pending = self.memory.runtime.wait_for_out_done(place, stream)
            if pending is not None:
                self._wait_for(pending)
        return result

    def _wait_for(self, pending: Pending) -> None:
        """Raises the lane's error when it ends: the worker may have died with its work undone."""
        while not pending.wait(LOOK_S):
            self._talk.turns.poll()
            ended = self._talk.ended
            if ended is not None:
                raise anew(ended)


@dataclass(slots=True, eq=False)
class _HeldPlace:
    """A request's place until somebody has its answer. Two threads may find that out at once."""

    place: int
    _rights: list[None] = field(default_factory=lambda: [None])

    def let_go(self) -> bool:
        """True for the first who asks."""
        try:
            self._rights.pop()
        except IndexError:
            return False
        return True
