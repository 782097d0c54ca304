# SPDX-License-Identifier: Apache-2.0
"""The client's end of a lane for threads: plain blocking calls, as many at once as there are
threads.

A call ends exactly once: with the worker's final response, or with Unavailable when the lane ends
first. One that its caller gave up keeps its number and its input memory until the final response
says that nobody reads them any more.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from thirdrail.errors import (
    FailedPrecondition,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.failures import with_note
from thirdrail.lane import forks
from thirdrail.lane.blocking_wire import BlockingWire, LaneBroken, close_all
from thirdrail.lane.calls import Call, NotSent, timed_out
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.futures import LaneFuture
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.packets import varint
from thirdrail.lane.places import Place
from thirdrail.lane.placing import Placer
from thirdrail.lane.questions import Questions
from thirdrail.lane.results import borrowed_result, private_result, release_outputs
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.lane.turns import Ticket, Turns
from thirdrail.lane.watcher import Watcher
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, lane_pb2

POLL_EVERY_CALLS = 16
RELEASE_NOW_BYTES = 1 << 20  # more waits for no other packet to travel with
EMPTY_TIMEOUT_S = 30.0  # of `empty`, while calls hold the whole input arena

# Keys of fields in the wire format: number << 3 | type.
_INFER_KEY = bytes((2 << 3 | 2,))  # of LaneRequest
_CALL_KEY = bytes((1 << 3 | 0,))  # of InferRequest

_OF_THE_PARENT = "this session belongs to the process that opened it, not to a forked child"


class BlockingLane:
    """One session with one worker. Use `hello.attach_lane`. Safe to use from several threads.

    is_debug: freed input memory is filled with 0xDB, and inputs that are written while a request
        reads them are reported.
    """

    def __init__(
        self, wire: BlockingWire, attached: lane_pb2.Attached, *, is_debug: bool = False
    ) -> None:
        self.session = attached.session
        self._wire = wire
        self._limits = attached.limits
        self._inline_bytes_max = attached.limits.inline_bytes
        self._packet_bytes_max = attached.limits.packet_bytes
        self._calls_max = attached.limits.calls_in_flight
        self._encoder = Encoder()
        self._numbers = itertools.count(1)
        self._memory = SessionMemory(attached, is_debug=is_debug)
        self._is_debug = is_debug
        self._calls: dict[int, Call] = {}
        self._ended: ThirdrailError | None = None
        self._set_up_turns()
        forks.forget_in_children(self)

    def _set_up_turns(self) -> None:
        self._lock = threading.Lock()  # guards the calls and the memory
        self._turns = Turns(self._lock, self._read)
        self._call_ended = Ticket()
        self._placer = Placer(
            self._lock, self._turns, self._memory, self._send, is_debug=self._is_debug
        )
        self.watcher = Watcher(self._lock, self._turns)
        self.questions = Questions(self._lock, self._turns, self._send)

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    @property
    def end_reason(self) -> str:
        """Why it has ended; empty: it has not."""
        return "" if self._ended is None else str(self._ended)

    @property
    def calls_in_flight(self) -> int:
        return len(self._calls)

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
            in_time = self._turns.wait(call, deadline_s)
        except BaseException:
            self.abandon(call)
            raise
        if not in_time:
            self.abandon(call)
            raise timed_out(timeout)
        return self.result_of(call)

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
                parts += self._placer.place(call, large, deadline_s, timeout)
            body = options + b"".join(parts)
            self._register(call, len(body), deadline_s, timeout)
            number = _CALL_KEY + varint(call.number)
            packet = b"".join((_INFER_KEY, varint(len(body) + len(number)), body, number))
            self._transmit(packet, deadline_s, timeout)
        except BaseException:
            self._withdraw(call)
            raise

    def submit(
        self,
        options: bytes,
        arrays: Mapping[str, Array],
        *,
        borrow: bool = False,
        timeout: float | None = None,
    ) -> LaneFuture:
        """`infer` that does not wait, except for room. Raises what `infer` raises before that."""
        future = LaneFuture(self, borrow=borrow, timeout=timeout)
        future.send(options, arrays)
        # Answers that nobody waits for yet must not fill the output arena.
        if not len(self._calls) % POLL_EVERY_CALLS:
            self._turns.poll()
        return future

    def wait(self, ticket: Ticket, deadline_s: float | None) -> bool:
        """Until a call, or something else, is done. False: the deadline passed, or the lane ended,
        first.
        """
        return self._turns.wait(ticket, deadline_s)

    def wake(self, ticket: Ticket) -> None:
        """Whoever waits for the ticket need not any more."""
        with self._lock:
            self._turns.complete(ticket)

    def poll(self) -> None:
        """Take in what has come, without waiting."""
        self._turns.poll()

    def result_of(self, call: Call) -> Result:
        """Of a call that is done; to be asked once. Raises the request's error."""
        response = call.response
        if call.error is not None:
            if response is not None:
                release_outputs(response, self._memory)
            raise call.error
        assert response is not None
        if call.borrow:
            with self._lock:
                return borrowed_result(response, self._memory, self._give_back)
        result = private_result(response, self._memory)
        if self._memory.releases.waiting_bytes >= RELEASE_NOW_BYTES:
            self._flush()
        return result

    def abandon(self, call: Call) -> None:
        """Nobody will take its result."""
        with self._lock:
            call.is_abandoned = True
            is_done = call.is_done
        if not is_done:
            cancel = inference_pb2.Cancel(call=call.number)
            with contextlib.suppress(ThirdrailError):
                self._send(lane_pb2.LaneRequest(cancel=cancel), 0.0)
        elif call.response is not None:
            release_outputs(call.response, self._memory)

    def empty(self, shape: Sequence[int] | int, dtype: npt.DTypeLike, *, alone: bool) -> Array:
        """An array to fill in and send without a copy.

        alone: in memory that can be exported. Raises ResourceExhausted when there is no room.
        """
        wanted = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = int(np.prod(shape, dtype=object)) * wanted.itemsize
        if wanted.hasobject or (nbytes <= self._inline_bytes_max and not alone):
            return np.empty(shape, wanted)  # it travels in the packet
        deadline_s = time.monotonic() + EMPTY_TIMEOUT_S
        if alone:
            place = self._placer.reserve_alone(max(1, nbytes), deadline_s, EMPTY_TIMEOUT_S)
        else:
            (place,) = self._placer.reserve([nbytes], deadline_s, EMPTY_TIMEOUT_S)
        with self._lock:
            shown = self._memory.shown.show(place, writable=True)
        array: Array = shown[:nbytes].view(wanted).reshape(shape)
        return array

    def close(self, error: ThirdrailError) -> None:
        """End the session in good order; calls in flight fail with the error."""
        with contextlib.suppress(ThirdrailError):
            self._send(lane_pb2.LaneRequest(close=lane_pb2.Close()), 0.0)
        self._end(error)

    def forget(self) -> None:
        """In a forked child: the session is the parent's."""
        error = FailedPrecondition(_OF_THE_PARENT)
        self._wire.forget()
        self._set_up_turns()  # threads that held locks, or read, are the parent's
        self._end(error)

    # Sending

    def _register(
        self, call: Call, body_bytes: int, deadline_s: float | None, timeout: float | None
    ) -> None:
        room = 2 * len(_INFER_KEY) + 20  # the call's number and the packet's own header
        if body_bytes + room > self._packet_bytes_max:
            raise with_note(
                ResourceExhausted(
                    f"the request without its tensors has {body_bytes} bytes, the lane takes "
                    f"{self._packet_bytes_max}"
                )
            )
        while True:
            with self._lock:
                if self._ended is not None:
                    raise NotSent(str(self._ended))
                if self._memory.collect():
                    self._placer.room_freed()
                if len(self._calls) < self._calls_max:
                    call.number = next(self._numbers)
                    self._calls[call.number] = call
                    return
                awaited = self._call_ended
            if not self._turns.wait(awaited, deadline_s):
                raise timed_out(timeout)

    def _transmit(self, packet: bytes, deadline_s: float | None, timeout: float | None) -> None:
        """Send a packet, and give back what there is to give back beside it."""
        releases = self._memory.releases
        taken = releases.take(self._packet_bytes_max - len(packet)) if releases else b""
        try:
            if not self._wire.send(packet + taken, deadline_s):
                raise timed_out(timeout)
        except LaneBroken as error:
            self._turns.poll()  # it may have said why
            self._end(Unavailable(str(error)))
            raise NotSent(str(self._ended)) from None
        except BaseException:
            releases.put_back(taken)
            raise

    def _send(self, message: lane_pb2.LaneRequest, deadline_s: float | None) -> None:
        self._transmit(message.SerializeToString(), deadline_s, None)

    def _withdraw(self, call: Call) -> None:
        """A call that was not sent leaves nothing behind."""
        with self._lock:
            self._calls.pop(call.number, None)
            self._memory.leave_all(call.places)
            call.places = []
            self._placer.room_freed()

    def _give_back(self, places: Sequence[Place]) -> None:
        """May run anywhere, also in the collector, inside our own lock."""
        for place in places:
            self._memory.shown.let_go(place)
        if self._lock.acquire(blocking=False):
            try:
                self._memory.collect()
            finally:
                self._lock.release()
            if self._memory.releases.waiting_bytes >= RELEASE_NOW_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Give back what waits, if the worker takes it at once."""
        releases = self._memory.releases
        while releases:
            taken = releases.take(self._packet_bytes_max)
            try:
                if self._wire.send(taken, 0.0):
                    continue
            except LaneBroken:
                pass  # the memory goes with the session
            return releases.put_back(taken)

    # Receiving: by one thread at a time, without the lock

    def _read(self, deadline_s: float | None) -> bool:
        """Read one packet. False: none came until the deadline, or the lane has ended."""
        try:
            received = self._wire.receive(self._packet_bytes_max, deadline_s)
            if received is None:
                return False
            message, fds = received
            kind = message.WhichOneof("message")
            if kind == "infer":
                self._on_response(message.infer)
            elif kind == "chunk":
                self._on_chunk(message.chunk, fds)
                return True
            elif kind == "grow_refused":
                with self._lock:
                    self._placer.refused(message.grow_refused.message)
            elif kind == "goodbye":
                raise LaneBroken(message.goodbye.status.message)
            elif kind is not None and self.questions.answered(kind, message, fds):
                return True
            close_all(fds)
        except LaneBroken as error:
            self._end(Unavailable(str(error)))
            return False
        return True

    def _on_response(self, response: inference_pb2.InferResponse) -> None:
        if not response.final:
            # No version of ours asks for partial responses.
            return release_outputs(response, self._memory)
        with self._lock:
            call = self._calls.pop(response.call, None)
            if call is None:
                return release_outputs(response, self._memory)
            call.response = response
            if call.places:
                self._leave_places(call)
            if len(self._calls) + 1 >= self._calls_max:
                ended, self._call_ended = self._call_ended, Ticket()
                self._turns.complete(ended)
            self._turns.complete(call)
            is_abandoned = call.is_abandoned
        if is_abandoned:
            release_outputs(response, self._memory)
        if call.on_done is not None:
            call.on_done()

    def _leave_places(self, call: Call) -> None:
        faults = (checksum.fault() for checksum in call.checksums)
        call.error = next(filter(None, faults), None)
        self._memory.leave_all(call.places)
        call.places = []
        self._placer.room_freed()

    def _on_chunk(self, chunk: lane_pb2.Chunk, fds: list[int]) -> None:
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        try:
            (fd,) = fds
            mapping = map_chunk(fd, chunk.size, writable=is_input)
        except (ValueError, OSError) as error:
            raise LaneBroken(f"the worker sent memory that cannot be used: {error}") from None
        with self._lock:
            alone = self._memory.add_chunk(chunk, np.frombuffer(mapping, np.uint8))
            if is_input:
                self._placer.chunk_came(alone)

    def _end(self, error: ThirdrailError) -> None:
        with self._lock:
            if self._ended is not None:
                return
            self._ended = error
            calls, self._calls = self._calls, {}
            self._placer.end(error)
            self.questions.end(error)
            self._turns.complete(self._call_ended)
            for call in calls.values():
                call.error = type(error)(str(error))
                self._turns.complete(call)
        self._wire.close()
        for call in calls.values():
            if call.on_done is not None:
                call.on_done()
