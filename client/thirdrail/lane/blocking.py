# SPDX-License-Identifier: Apache-2.0
"""The client's end of a lane for threads: plain blocking calls, as many at once as there are
threads.
"""

import threading
import time
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from thirdrail.dtypes import extent
from thirdrail.errors import FailedPrecondition, ThirdrailError
from thirdrail.failures import anew
from thirdrail.lane import forks
from thirdrail.lane.blocking_wire import BlockingWire
from thirdrail.lane.calls import Call, timed_out
from thirdrail.lane.conversation import Conversation
from thirdrail.lane.device_memory import DeviceMemory
from thirdrail.lane.device_session import DeviceSession
from thirdrail.lane.device_session import attach as attach_device
from thirdrail.lane.encoding import Encoder, LargeInput
from thirdrail.lane.futures import LaneFuture, WhyMissing
from thirdrail.lane.places import Place
from thirdrail.lane.results import borrowed_result, private_result, release_outputs
from thirdrail.lane.turns import Ticket
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2

RELEASE_NOW_BYTES = 1 << 20  # so much waits for no packet to travel with
POLL_EVERY_CALLS = 16  # of which nobody may be waiting for any
EMPTY_TIMEOUT_S = 30.0  # of `empty`, while calls hold the whole input arena

_OF_THE_PARENT = "this session belongs to the process that opened it, not to a forked child"


class BlockingLane:
    """One session with one worker. Use `hello.attach_lane`. Safe to use from several threads.

    is_debug: see Conversation.
    """

    def __init__(
        self, wire: BlockingWire, attached: lane_pb2.Attached, *, is_debug: bool = False
    ) -> None:
        self.session = attached.session
        self._inline_bytes_max = attached.limits.inline_bytes
        self._encoder = Encoder()
        self._talk = Conversation(wire, attached, is_debug=is_debug)
        self._device: DeviceMemory | ThirdrailError | None = None
        self._device_lock = threading.Lock()
        forks.forget_in_children(self)
        self._itself = weakref.ref(self)

    @property
    def has_ended(self) -> bool:
        """Also while the garbage collector is about to take it: a finalizer may still make calls,
        and the lane's parts, which have each other weakly, find each other no more by then.
        """
        return self._talk.ended is not None or self._itself() is None

    @property
    def end_reason(self) -> str:
        """Why it has ended; empty: it has not."""
        return str(self._talk.ended or ("its client is garbage" if self.has_ended else ""))

    @property
    def talk(self) -> Conversation:
        """For what has packets of its own: exports, pings."""
        return self._talk

    def infer(
        self,
        options: bytes,
        arrays: Mapping[str, Array],
        *,
        borrow: bool = False,
        timeout: float | None = None,
    ) -> Result:
        """Runs a model once and waits for its outputs.

        options: the InferRequest without its inputs, see `Encoder.options`.
        Raises the request's error, TimedOut after `timeout` seconds, Unavailable when the lane
        ends; NotSent, which is one, where the worker has not heard of the request.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        call = Call(borrow=borrow)
        self.start(call, options, arrays, deadline_s, timeout)
        try:
            in_time = self._talk.turns.wait(call, deadline_s)
        except BaseException:
            self._talk.abandon(call)
            raise
        if not in_time:
            self._talk.abandon(call)
            raise timed_out(timeout)
        return self.result_of(call)

    def submit(
        self,
        options: bytes,
        arrays: Mapping[str, Array],
        *,
        borrow: bool = False,
        timeout: float | None = None,
        why_missing: WhyMissing | None = None,
    ) -> LaneFuture:
        """`infer` that waits for nothing but room. Raises what `infer` raises before it waits.

        why_missing: see LaneFuture.
        """
        future = LaneFuture(self, borrow=borrow, timeout=timeout, why_missing=why_missing)
        future.send(options, arrays)
        if not future.call.number % POLL_EVERY_CALLS:
            self.poll()  # results that nobody asks for yet must not fill the output arena
        return future

    # What a future is made of

    def start(
        self,
        call: Call,
        options: bytes,
        arrays: Mapping[str, Array],
        deadline_s: float | None,
        timeout: float | None,
    ) -> None:
        """Sends a request, after waiting for room where there is none. Raises like `infer`."""
        parts, large = self._encoder.inputs(arrays, self._inline_bytes_max)
        try:
            if large:
                parts += self._talk.placer.place(call, large, deadline_s, timeout)
            self._talk.send_call(call, b"".join((options, *parts)), deadline_s, timeout)
        except BaseException:
            self._talk.withdraw(call)
            raise

    def encode(self, arrays: Mapping[str, Array]) -> tuple[list[bytes], list[LargeInput]]:
        """See `Encoder.inputs`."""
        return self._encoder.inputs(arrays, self._inline_bytes_max)

    def device(self, uuid: str) -> DeviceSession:
        """This session's part of the worker's device. See `device_session.attach`."""
        with self._device_lock:
            if self._device is None:
                self._device = attach_device(self._talk, uuid)
            device = self._device
        if isinstance(device, ThirdrailError):
            raise anew(device)
        device.require_device(uuid)
        return DeviceSession(self, device)

    def wait(self, ticket: Ticket, deadline_s: float | None) -> bool:
        """Until a call, or something else, is done. False: the deadline passed, or the lane ended,
        first.
        """
        return self._talk.turns.wait(ticket, deadline_s)

    def wake(self, ticket: Ticket) -> None:
        """Whoever waits for the ticket need not any more."""
        with self._talk.lock:
            self._talk.turns.complete(ticket)

    def poll(self) -> None:
        """Take in what has come, without waiting."""
        self._talk.turns.poll()

    def abandon(self, call: Call) -> None:
        """Nobody will take its result."""
        self._talk.abandon(call)

    def result_of(self, call: Call) -> Result:
        """Of a call that is done; to be asked once. Raises the request's error."""
        response, memory = call.response, self._talk.memory
        if call.error is not None:
            if response is not None:
                release_outputs(response, memory)
            raise call.error
        assert response is not None
        if call.borrow:
            with self._talk.lock:
                return borrowed_result(response, memory, self._give_back)
        result = private_result(response, memory)
        if memory.releases.waiting_bytes >= RELEASE_NOW_BYTES:
            self._talk.flush()
        return result

    # Memory

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike, *, alone: bool) -> Array:
        """An array to fill in and send without a copy.

        alone: in memory that can be exported. Raises ResourceExhausted when there is no room.
        """
        shape, wanted, nbytes = extent(shape, dtype)
        if wanted.hasobject or nbytes <= (0 if alone else self._inline_bytes_max):
            return np.empty(shape, wanted)  # it travels in the packet
        deadline_s = time.monotonic() + EMPTY_TIMEOUT_S
        if alone:
            self._talk.give_back_unused()  # there may be so many such chunks and no more
            place = self._talk.placer.reserve_alone(nbytes, deadline_s, EMPTY_TIMEOUT_S)
            place.size = nbytes  # the rest of its pages is no part of the tensor
        else:
            (place,) = self._talk.placer.reserve([nbytes], deadline_s, EMPTY_TIMEOUT_S)
        with self._talk.lock:
            shown = self._talk.memory.shown.show(place, writable=True)
            # Who saw the place taken, and not yet an array's, may be waiting for a call's end.
            self._talk.placer.room_freed()
        array: Array = shown[:nbytes].view(wanted).reshape(shape)
        return array

    def _give_back(self, places: Sequence[Place]) -> None:
        """May run anywhere, also in the collector, inside our own lock."""
        memory, lock = self._talk.memory, self._talk.lock
        for place in places:
            memory.shown.let_go(place)
        if lock.acquire(blocking=False):
            try:
                if memory.collect():
                    self._talk.placer.room_freed()
            finally:
                lock.release()
            if memory.releases.waiting_bytes >= RELEASE_NOW_BYTES:
                self._talk.flush()

    # Ending

    def close(self, error: ThirdrailError) -> None:
        """End the session in good order; calls in flight fail with the error."""
        self._talk.hang_up(error)

    def forget(self) -> None:
        """In a forked child: the session is the parent's."""
        self._talk.forget(FailedPrecondition(_OF_THE_PARENT))
