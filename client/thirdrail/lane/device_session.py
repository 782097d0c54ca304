# SPDX-License-Identifier: Apache-2.0
"""A session's part of the worker's device, at the client's end: memory, places, requests.

The rules of order are in docs/lane.md, section 17. Memory and places go back when arrays are
collected, which is only noted then: finalisers may run anywhere. Whoever asks for something next
gives them back.
"""

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt

from thirdrail.device.arrays import Block, DeviceArray, DeviceResult
from thirdrail.device.runtime import open_runtime
from thirdrail.dtypes import BYTES, dtype_of_array, dtype_of_value, extent
from thirdrail.errors import (
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ThirdrailError,
)
from thirdrail.failures import with_note
from thirdrail.lane.calls import Call, timed_out
from thirdrail.lane.device_chunks import DeviceChunks
from thirdrail.lane.packets import close_all
from thirdrail.lane.results import private_output, private_outputs
from thirdrail.tensors import Array, element_count
from thirdrail.v1 import inference_pb2, lane_pb2, tensor_pb2

if TYPE_CHECKING:
    from thirdrail.lane.blocking import BlockingLane

ATTACH_TIMEOUT_S = 30.0  # a device that nobody used yet is opened for it
EMPTY_TIMEOUT_S = 30.0  # as on the host


def attach(lane: "BlockingLane", uuid: str) -> "DeviceSession":
    """Ask the lane's worker for its device. Once in a session.

    Raises FailedPrecondition where there is none to get, InvalidArgument for another device.
    """
    talk = lane.talk
    made: list[tuple[lane_pb2.DeviceAttached, DeviceChunks]] = []
    failures: list[ThirdrailError | ValueError | OSError] = []

    def on_answer(message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        """Before the reader goes on: what it reads next may be a chunk."""
        attached = message.device_attached
        if attached.status.reason:
            return close_all(fds)
        try:
            chunks = talk.device_chunks = DeviceChunks(attached, open_runtime(attached, fds))
        except (ThirdrailError, ValueError, OSError) as error:
            return failures.append(error)
        made.append((attached, chunks))

    request = lane_pb2.LaneRequest(device=lane_pb2.DeviceRequest(uuid=uuid))
    talk.questions.ask(request, ATTACH_TIMEOUT_S, on_answer)
    if failures:
        raise failures[0]
    return DeviceSession(lane, *made[0])


Inputs = Mapping[str, Array | DeviceArray]


class _Watch(weakref.ref[Block]):
    """Tells, by a deque's append, when nothing shows a block any more."""

    __slots__ = ("give_back",)
    give_back: Callable[[], None]


@dataclass(slots=True)
class _Lease:
    """A result's memory on the device."""

    block: Block
    watch: _Watch
    collected: "deque[_Watch]"

    def release(self) -> None:
        """What was read until now was given to the block's stream."""
        self.block.is_released = True
        self.collected.append(self.watch)


class DeviceSession:
    """Made by `attach`. Safe to use from several threads."""

    def __init__(
        self, lane: "BlockingLane", attached: lane_pb2.DeviceAttached, chunks: DeviceChunks
    ) -> None:
        self.uuid = attached.uuid
        self._lane = lane
        self._talk = lane.talk
        self._chunks = chunks
        self._runtime = chunks.runtime
        self._places = deque(range(1, attached.places + 1))  # free ones, the longest first
        self._place_count = attached.places
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._collected: deque[_Watch] = deque()

    # Memory

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike, stream: int) -> DeviceArray:
        """Raises ResourceExhausted when there is no room, InvalidArgument for text."""
        dims, wanted, nbytes = extent(shape, dtype)
        if wanted.hasobject:
            raise InvalidArgument(f"{wanted} cannot lie on a device")
        self.collect()
        deadline_s = time.monotonic() + EMPTY_TIMEOUT_S
        place = self._talk.placer.reserve_on_device(
            nbytes, lambda: self._chunks.allocate(nbytes), deadline_s, EMPTY_TIMEOUT_S
        )
        return DeviceArray(self._input_block(place, stream), 0, dims, wanted)

    def _input_block(self, place: tuple[int, int], stream: int) -> Block:
        epoch, chunks, lock = self._chunks.input_epoch, self._chunks, self._talk.lock
        ref = tensor_pb2.ArenaRef(epoch=epoch, chunk=place[0], offset=place[1])
        block = Block(chunks, self._runtime, chunks.address(epoch, *place), stream, ref)

        def give_back() -> None:
            with lock:
                chunks.allocator.free(*place)

        self._watch(block, give_back)
        return block

    def _watch(self, block: Block, give_back: Callable[[], None]) -> _Watch:
        watch = _Watch(block, self._collected.append)
        watch.give_back = give_back
        with self._lock:
            self._watches.add(watch)
        return watch

    def collect(self) -> None:
        """Give back what arrays showed that are gone."""
        while self._collected:
            try:
                watch = self._collected.popleft()
            except IndexError:
                return  # another thread was faster
            with self._lock:
                is_new = watch in self._watches
                self._watches.discard(watch)
            if is_new:
                with contextlib.suppress(ThirdrailError):  # it goes with the session then
                    watch.give_back()

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
        held = _HeldPlace(self._take_place())
        head.event_place = held.place
        call = Call(borrow=False)
        call.on_done = lambda: self._recover(call, held) if call.is_abandoned else None
        try:
            body = self._body(call, head, inputs, stream, deadline_s, timeout)
            self._runtime.record_in_ready(held.place, stream)
            self._talk.send_call(call, body, deadline_s, timeout)
        except BaseException:
            self._talk.withdraw(call)
            self._places.append(held.place)
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

    def _take_place(self) -> int:
        self.collect()
        try:
            return self._places.popleft()
        except IndexError:
            raise with_note(
                ResourceExhausted(
                    f"results on the device, or requests in flight, hold all {self._place_count} "
                    "places of this session; let go of some results"
                )
            ) from None

    def _abandon(self, call: Call, held: "_HeldPlace") -> None:
        self._talk.abandon(call)
        if call.is_done:
            self._recover(call, held)

    def _recover(self, call: Call, held: "_HeldPlace") -> None:
        """An answer came that nobody takes. By whoever reads, or by whoever gave the call up."""
        if not held.let_go():
            return
        outputs = () if call.response is None else call.response.outputs
        refs = [tensor.ref for tensor in outputs if self._is_on_device(tensor)]
        if refs:
            self._result_block(refs[0], held.place, 0)  # which is gone at once
        else:
            self._places.append(held.place)

    def _body(
        self,
        call: Call,
        head: inference_pb2.InferRequest,
        inputs: Inputs,
        stream: int,
        deadline_s: float | None,
        timeout: float | None,
    ) -> bytes:
        arrays: dict[str, Array] = {}
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                head.inputs.append(self._device_input(name, value, stream))
            else:
                arrays[name] = value
        parts, large = self._lane.encode(arrays)
        if large:
            parts += self._talk.placer.place(call, large, deadline_s, timeout)
        return b"".join((head.SerializeToString(), *parts))

    def _device_input(self, name: str, array: DeviceArray, stream: int) -> tensor_pb2.Tensor:
        block, nbytes = array.block, array.nbytes
        if block.owner is not self._chunks:
            raise InvalidArgument(f"input '{name}' is an array of another session")
        offset = array.address - block.address  # raises for one that was released
        self._runtime.join(stream, block.stream)
        dtype = dtype_of_array(cast("Array", array))
        tensor = tensor_pb2.Tensor(name=name, data_type=dtype.value, shape=array.shape)
        tensor.ref.CopyFrom(block.ref)
        tensor.ref.offset += offset
        tensor.ref.size = nbytes
        return tensor

    def _result_of(self, call: Call, place: int, stream: int) -> DeviceResult:
        response = call.response
        assert response is not None
        refs = [tensor.ref for tensor in response.outputs if self._is_on_device(tensor)]
        if not refs:
            self._places.append(place)
            return DeviceResult(response, private_outputs(response, self._talk.memory))
        block, watch = self._result_block(refs[0], place, stream)
        arrays: dict[str, Any] = {}
        for tensor in response.outputs:
            if self._is_on_device(tensor):
                arrays[tensor.name] = self._device_array(tensor, block)
            else:
                arrays[tensor.name] = private_output(tensor, self._talk.memory)
        self._runtime.wait_for_out_done(place, stream)
        return DeviceResult(response, arrays, _Lease(block, watch, self._collected))

    def _is_on_device(self, tensor: tensor_pb2.Tensor) -> bool:
        return tensor.ref.epoch == self._chunks.output_epoch

    def _device_array(self, tensor: tensor_pb2.Tensor, block: Block) -> DeviceArray:
        dtype = dtype_of_value(tensor.data_type)
        count = element_count(tensor.name, tensor.shape)
        if dtype.numpy is None or dtype is BYTES or tensor.ref.size != count * dtype.itemsize:
            raise Internal(f"the server's answer cannot be read: '{tensor.name}' is no such tensor")
        offset = self._chunks.result_address(tensor.ref) - block.address
        return DeviceArray(block, offset, tuple(tensor.shape), dtype.numpy)

    def _result_block(
        self, ref: tensor_pb2.ArenaRef, place: int, stream: int
    ) -> tuple[Block, _Watch]:
        """The memory of an answer's results, of which the reference is one."""
        address = self._chunks.result_address(ref)
        block = Block(self._chunks, self._runtime, address, stream, ref)
        lease = lane_pb2.Lease(epoch=ref.epoch, slot=ref.slot, generation=ref.generation)

        def give_back() -> None:
            """At once and not with the next packet: the place may be the next request's."""
            self._runtime.record_consumed(place, stream)
            self._talk.send(lane_pb2.LaneRequest(releases=[lease]), None)
            self._places.append(place)

        return block, self._watch(block, give_back)


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
