# SPDX-License-Identifier: Apache-2.0
"""What is said on one lane, both ways, for threads: calls go out, answers and memory come in.

A call ends exactly once: with the worker's final response, or with an error when the lane ends
first. One that its caller gave up keeps its number and its input memory until the final response
says that nobody reads them any more.
"""

import contextlib
import itertools
import threading
from collections.abc import Sequence

import numpy as np

from thirdrail.errors import ResourceExhausted, ThirdrailError, TimedOut, Unavailable
from thirdrail.failures import with_note
from thirdrail.lane.blocking_wire import BlockingWire, LaneBroken
from thirdrail.lane.calls import Call, NotSent, timed_out
from thirdrail.lane.device_chunks import DeviceChunks
from thirdrail.lane.memory import map_chunk
from thirdrail.lane.packets import close_all, sole_fd, varint
from thirdrail.lane.placing import Placer
from thirdrail.lane.questions import Questions
from thirdrail.lane.results import release_outputs
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.lane.turns import Notice, Turns
from thirdrail.lane.watcher import Watcher
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail.weakly import weakly

# Keys of fields in the wire format: number << 3 | type.
_INFER_KEY = bytes((2 << 3 | 2,))  # of LaneRequest
_CALL_KEY = bytes((1 << 3 | 0,))  # of InferRequest
# With fewer calls in flight than this, looking for early answers costs more than it saves.
READ_AHEAD_CALLS_MIN = 4
_HEADERS_BYTES_MAX = 20  # both keys, a length and a call's number


class Conversation:
    """Takes over the wire of a lane that is attached.

    is_debug: freed input memory is filled with 0xDB, and inputs that are written while a request
        reads them fail it.
    """

    def __init__(self, wire: BlockingWire, attached: lane_pb2.Attached, *, is_debug: bool) -> None:
        self._wire = wire
        self._packet_bytes_max = attached.limits.packet_bytes
        self._calls_max = attached.limits.calls_in_flight
        self._is_debug = is_debug
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self.memory = SessionMemory(attached, is_debug=is_debug)
        self.device_chunks: DeviceChunks | None = None
        self.ended: ThirdrailError | None = None
        self._parting: ThirdrailError | None = None  # why we hang up
        self._set_up_turns()

    def _set_up_turns(self) -> None:
        self.lock = threading.Lock()  # guards the calls and the memory
        wire = self._wire
        read, send = weakly(self._read), weakly(self.send)
        self.turns = Turns(self.lock, read, weakly(self._expects_more), wire.look_out, wire.ring)
        self.watcher = Watcher(self.lock, self.turns)
        self.questions = Questions(self.lock, self.turns, send)
        self.placer = Placer(self.lock, self.turns, self.memory, send, is_debug=self._is_debug)
        self._call_ended = Notice()

    @property
    def calls_in_flight(self) -> int:
        return len(self._calls)

    def _expects_more(self) -> bool:
        return len(self._calls) >= READ_AHEAD_CALLS_MIN

    # Sending

    def send_call(
        self, call: Call, body: bytes, deadline_s: float | None, timeout: float | None
    ) -> None:
        """Sends an InferRequest that has no number, after waiting while too many are in flight.

        Raises ResourceExhausted for one that does not fit a packet, TimedOut at the deadline,
        NotSent when the lane has ended. The call must then be withdrawn.
        """
        if len(body) + _HEADERS_BYTES_MAX > self._packet_bytes_max:
            raise with_note(
                ResourceExhausted(
                    f"the request without its tensors has {len(body)} bytes, the lane takes "
                    f"{self._packet_bytes_max - _HEADERS_BYTES_MAX}"
                )
            )
        self._register(call, deadline_s, timeout)
        if self.memory.drops:
            self.send_drops()
        number = _CALL_KEY + varint(call.number)
        packet = b"".join((_INFER_KEY, varint(len(body) + len(number)), body, number))
        self._transmit(packet, deadline_s, timeout)

    def withdraw(self, call: Call) -> None:
        """A call that was not sent leaves nothing behind."""
        with self.lock:
            self._take_out(call.number)
            call.on_done = None
            if call.places:
                self._leave_places(call)

    def abandon(self, call: Call) -> None:
        """Nobody will take its result."""
        with self.lock:
            call.is_abandoned = True
            is_done = call.is_done
        if not is_done:
            cancel = inference_pb2.Cancel(call=call.number)
            with contextlib.suppress(ThirdrailError):
                self.send(lane_pb2.LaneRequest(cancel=cancel), 0.0)
        elif call.response is not None:
            release_outputs(call.response, self.memory)

    def send(self, message: lane_pb2.LaneRequest, deadline_s: float | None) -> None:
        """Raises TimedOut when the worker does not take it in time, NotSent at the lane's end."""
        self._transmit(message.SerializeToString(), deadline_s, None)

    def flush(self) -> None:
        """Give back what waits to be given back, if the worker takes it at once."""
        releases = self.memory.releases
        # Another thread may be faster, and an empty packet would read as our end.
        while taken := releases.take(self._packet_bytes_max):
            try:
                if self._wire.send(taken, 0.0):
                    continue
            except LaneBroken:
                pass  # the memory goes with the session
            return releases.put_back(taken)

    def _register(self, call: Call, deadline_s: float | None, timeout: float | None) -> None:
        while True:
            with self.lock:
                if self.ended is not None:
                    raise NotSent(str(self.ended))
                if self.memory.shown.has_collected and self.memory.collect():
                    self.placer.room_freed()
                if len(self._calls) < self._calls_max:
                    call.number = next(self._numbers)
                    self._calls[call.number] = call
                    return
                awaited = self._call_ended
            if not self.turns.wait(awaited, deadline_s):
                raise timed_out(timeout)

    def _transmit(self, packet: bytes, deadline_s: float | None, timeout: float | None) -> None:
        releases = self.memory.releases
        taken = releases.take(self._packet_bytes_max - len(packet)) if releases else b""
        try:
            if self._wire.send(packet + taken if taken else packet, deadline_s):
                return
        except LaneBroken as error:
            self.turns.poll()  # it may have said why
            self.end(Unavailable(str(error)))
            raise NotSent(str(self.ended)) from None
        except BaseException:
            releases.put_back(taken)
            raise
        releases.put_back(taken)
        raise timed_out(timeout)

    def give_back_unused(self) -> None:
        """Imported tensors and chunks of one tensor that nobody has any more."""
        with self.lock:
            if self.memory.collect():
                self.placer.room_freed()
        if self.memory.drops:
            self.send_drops()

    def send_drops(self) -> None:
        """Give back what goes back by itself: imported tensors, and chunks of one tensor."""
        with self.lock:
            drops, self.memory.drops = self.memory.drops, []
        while drops:
            epoch, chunk = drops[-1]
            drop = lane_pb2.LaneRequest(drop=lane_pb2.DropRequest(epoch=epoch, chunk=chunk))
            try:
                self.send(drop, 0.0)
            except TimedOut:  # the worker is busy: with the next packet, then
                with self.lock:
                    self.memory.drops += drops
                return
            except ThirdrailError:
                return  # it goes with the session
            drops.pop()

    # Receiving: by one thread at a time, without the lock

    def _read(self, deadline_s: float | None) -> bool:
        """Read one packet. False: none came until the deadline, or the lane has ended."""
        try:
            received = self._wire.receive(self._packet_bytes_max, deadline_s)
            if received is None:
                return False
            message, fds = received
            if message.HasField("infer"):
                close_all(fds)
                self._on_response(message.infer)
            elif message.HasField("chunk"):
                self._on_chunk(message.chunk, fds)
            else:
                self._on_other(message, fds)
        except LaneBroken as error:
            why = str(error)
        else:
            return True
        self.end(Unavailable(why))  # not in the handler: it would be the context of every error
        return False

    def _on_response(self, response: inference_pb2.InferResponse) -> None:
        if not response.final:
            # No version of ours asks for partial responses.
            return release_outputs(response, self.memory)
        with self.lock:
            call = self._take_out(response.call)
            if call is None:
                return release_outputs(response, self.memory)
            call.response = response
            if call.places:
                self._leave_places(call)
            self.turns.complete(call)
            is_abandoned = call.is_abandoned
        if is_abandoned:
            release_outputs(response, self.memory)
        call.tell()

    def _take_out(self, number: int) -> Call | None:
        """The call is no longer in flight. Wakes whoever waits until fewer are."""
        call = self._calls.pop(number, None)
        if call is not None and len(self._calls) + 1 >= self._calls_max:
            ended, self._call_ended = self._call_ended, Notice()
            self.turns.complete(ended)
        return call

    def _leave_places(self, call: Call) -> None:
        faults = (checksum.fault() for checksum in call.checksums)
        call.error = next(filter(None, faults), None)
        self.memory.leave_all(call.places)
        call.places = []
        self.placer.room_freed()

    def _on_chunk(self, chunk: lane_pb2.Chunk, fds: Sequence[int]) -> None:
        if self.device_chunks is not None and self.device_chunks.takes(chunk):
            return self._on_device_chunk(self.device_chunks, chunk, fds)
        is_input = chunk.role == lane_pb2.ARENA_ROLE_INPUT
        try:
            mapping = map_chunk(sole_fd(fds), chunk.size, writable=is_input)
            with self.lock:
                alone = self.memory.add_chunk(chunk, np.frombuffer(mapping, np.uint8))
                if is_input:
                    self.placer.chunk_came(alone)
        except (ValueError, OSError) as error:
            raise LaneBroken(f"the worker sent memory that cannot be used: {error}") from None

    def _on_device_chunk(
        self, chunks: DeviceChunks, chunk: lane_pb2.Chunk, fds: Sequence[int]
    ) -> None:
        try:
            chunks.open(chunk, sole_fd(fds))
        except (ValueError, OSError, ThirdrailError) as error:
            raise LaneBroken(f"the worker sent memory that cannot be used: {error}") from None
        with self.lock:
            if chunks.add_room(chunk):
                self.placer.chunk_came(None)

    def _on_other(self, message: lane_pb2.LaneResponse, fds: list[int]) -> None:
        kind = message.WhichOneof("message") or ""
        if kind == "revoked" and message.revoked.epoch:
            with self.lock:
                self.memory.revoked.add(message.revoked.epoch)
            return close_all(fds)
        if self.questions.answered(kind, message, fds):
            return None
        close_all(fds)
        if kind == "grow_refused":
            with self.lock:
                self.placer.refused(message.grow_refused.message)
        elif kind == "imported" and not message.imported.status.reason:
            with self.lock:  # who asked for it has given up
                self.memory.drops.append((message.imported.epoch, 0))
        elif kind == "goodbye":
            raise LaneBroken(message.goodbye.status.message)

    # Ending

    def hang_up(self, error: ThirdrailError) -> None:
        """End the session in good order; calls in flight fail with the error.

        Arrays that somebody still has stay readable: their memory is never used again. Without a
        Close the worker would count it until this process ends, whenever they go.
        """
        self._parting = error  # whoever reads may see the worker hang up before we do
        with contextlib.suppress(ThirdrailError):
            self.send(lane_pb2.LaneRequest(close=lane_pb2.Close()), 0.0)
        self.end(error)

    def forget(self, error: ThirdrailError) -> None:
        """In a forked child: close what was inherited."""
        self._wire.forget()
        self._set_up_turns()  # threads that held locks, or read, are the parent's
        for call in self._calls.values():
            call.on_done = None  # and so are those that may hold the locks of who would be told
        self.end(error)

    def end(self, error: ThirdrailError) -> None:
        """Calls in flight, and whoever waits for something, fail with the error."""
        with self.lock:
            if self.ended is not None:
                return
            self.ended = error = self._parting or error
            calls, self._calls = self._calls, {}
            self.placer.end()
            self.questions.end(error)
            self.turns.complete(self._call_ended)
            for call in calls.values():
                call.error = with_note(type(error)(str(error)))
                self.turns.complete(call)
        self._wire.close()
        for call in calls.values():
            call.tell()
