# SPDX-License-Identifier: Apache-2.0
"""The worker's end of one lane: packets in, calls to the models, packets out.

A peer is never trusted: whatever a packet says is checked here or in `requests`. A packet that
    makes no sense ends the session with a goodbye that says why; a request that makes no sense is
    answered.
Every call ends exactly once: with a response, or with the session.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from thirdrail.errors import (
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ThirdrailError,
    Unimplemented,
)
from thirdrail.lane import packets
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.arenas import InputArena, NewChunk, OutputArena
from thirdrail_server.worker.execution import Member
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.requests import read_request
from thirdrail_server.worker.served_version import Call, Ending

log = logging.getLogger(__name__)

VERSION_MIN = 1
VERSION_MAX = 1
FEATURES: frozenset[str] = frozenset()

PACKETS_PER_WAKEUP_MAX = 64
_INFER_KEY = bytes((2 << 3 | 2,))  # of LaneResponse's field `infer` in the wire format
# A response that carries nothing but these two fits a packet, whatever characters they consist of.
ERROR_TEXT_CHARS_MAX = 4096
REQUEST_ID_CHARS_MAX = 1024


@dataclass(frozen=True, slots=True)
class _BoundModel:
    name: str
    version: int


class LaneSession:
    """One client of the worker. Its end of file, a broken rule or `close` ends it."""

    def __init__(
        self,
        sock: socket.socket,
        models: ModelTable,
        limits: LaneLimits,
        *,
        is_front: bool,
        on_closed: Callable[["LaneSession"], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._models = models
        self._limits = limits
        self._is_front = is_front
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        # One response for each call in flight and each chunk asked for, and some room for refusals.
        self._outbox = Outbox(
            sock, self._loop, packets_max=2 * limits.calls_in_flight_max, fail=self.close
        )
        self._input = InputArena(limits.input_arena_bytes_max)
        self._output = OutputArena(limits.output_arena_bytes_max)
        self._calls: dict[int, Call] = {}
        self._model_ids: dict[int, _BoundModel] = {}
        self._is_attached = False
        self._is_growing = False
        self.is_closed = False
        self._loop.add_reader(sock, self._on_readable)

    @property
    def arena_bytes(self) -> int:
        return self._input.total_bytes + self._output.total_bytes

    @property
    def calls_in_flight(self) -> int:
        return len(self._calls)

    def close(self, reason: str = "") -> None:
        """End the session: its calls are cancelled, their results dropped, its memory let go."""
        if self.is_closed:
            return
        self.is_closed = True
        if reason:
            log.warning("lane session ends: %s", reason)
        self._loop.remove_reader(self._sock)
        self._outbox.close()
        self._sock.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cancel()
        # Not left to the garbage collector: a session is part of cycles.
        self._input.close()
        self._output.close()
        self._on_closed(self)

    def goodbye(self, error: ThirdrailError) -> None:
        """Say why, then close."""
        status = pb.Status(reason=error.reason, message=error.message)
        self._send(lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status)))
        self.close(error.message)

    # Receiving

    def _on_readable(self) -> None:
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            if self.is_closed:
                return None
            try:
                packet = packets.receive(self._sock, self._limits.packet_bytes_max)
            except BlockingIOError:
                return None
            except packets.PacketTooLarge as error:
                return self.goodbye(InvalidArgument(str(error)))
            except OSError as error:
                return self.close(f"receiving failed: {error.strerror}")
            if not packet:
                return self.close()
            try:
                message = lane_pb2.LaneRequest.FromString(packet)
            except DecodeError:
                return self.goodbye(
                    InvalidArgument(f"a packet of {len(packet)} bytes is not a LaneRequest")
                )
            self._on_message(message)

    def _on_message(self, message: lane_pb2.LaneRequest) -> None:
        for lease in message.releases:
            self._output.release(lease.epoch, lease.slot, lease.generation)
        kind = message.WhichOneof("message")
        if kind == "hello":
            self._on_hello(message.hello)
        elif not self._is_attached:
            self.goodbye(InvalidArgument(f"the first message must be a hello, got {kind}"))
        elif kind == "infer":
            self._on_infer(message.infer, message.flow if self._is_front else 0)
        elif kind == "cancel":
            call = self._calls.get(message.cancel.call)
            if call is not None:
                call.cancel()
        elif kind == "grow":
            self._on_grow(message.grow.size)
        elif not message.releases:
            self.goodbye(Unimplemented("a packet holds no message that this worker knows"))

    def _on_hello(self, hello: lane_pb2.Hello) -> None:
        if self._is_attached:
            return self.goodbye(InvalidArgument("the lane is attached already"))
        version = min(VERSION_MAX, hello.version_max)
        if version < max(VERSION_MIN, hello.version_min):
            return self.goodbye(
                Unimplemented(
                    f"this worker speaks lane versions {VERSION_MIN} to {VERSION_MAX}, the client "
                    f"{hello.version_min} to {hello.version_max}"
                )
            )
        self._is_attached = True
        limits = lane_pb2.Limits(
            packet_bytes=self._limits.packet_bytes_max,
            inline_bytes=self._limits.inline_bytes_max,
            calls_in_flight=self._limits.calls_in_flight_max,
            input_arena_bytes=self._limits.input_arena_bytes_max,
            output_arena_bytes=self._limits.output_arena_bytes_max,
            model_ids=self._limits.model_ids_max,
        )
        attached = lane_pb2.Attached(
            version=version,
            features=sorted(FEATURES.intersection(hello.features)),
            limits=limits,
            input_epoch=self._input.epoch,
            output_epoch=self._output.epoch,
        )
        self._send(lane_pb2.LaneResponse(attached=attached))

    # Calls

    def _on_infer(self, message: pb.InferRequest, flow: int) -> None:
        now_ns = time.monotonic_ns()
        try:
            if message.call in self._calls:
                raise InvalidArgument(f"call {message.call} is in flight already")
            if len(message.request_id) > REQUEST_ID_CHARS_MAX:
                raise InvalidArgument(
                    f"a request id takes at most {REQUEST_ID_CHARS_MAX} characters, got "
                    f"{len(message.request_id)}"
                )
            if len(self._calls) >= self._limits.calls_in_flight_max:
                raise ResourceExhausted(
                    f"{len(self._calls)} calls are in flight in this session, the most it may have"
                )
            model = self._model_of(message)
            served = self._models.find(model.name, model.version)
            request = read_request(message, served.spec, self._input.view)
        except ThirdrailError as error:
            return self._respond_failure(message.call, message.request_id, error)
        member = Member(request, self._output, self._limits.inline_bytes_max)
        call = Call(member, served, self._on_ended, now_ns)
        self._calls[message.call] = call
        served.submit(
            call,
            flow=(id(self), flow),
            priority=message.priority,
            timeout_us=message.timeout_us,
            now_ns=now_ns,
        )

    def _model_of(self, message: pb.InferRequest) -> _BoundModel:
        """By name, by id, or by both, which binds the id."""
        if not message.model_id:
            return _BoundModel(message.model_name, message.model_version)
        if message.model_name:
            if (
                len(self._model_ids) >= self._limits.model_ids_max
                and message.model_id not in self._model_ids
            ):
                raise ResourceExhausted(
                    f"{len(self._model_ids)} model ids are bound in this session, the most allowed"
                )
            bound = _BoundModel(message.model_name, message.model_version)
            self._model_ids[message.model_id] = bound
            return bound
        try:
            return self._model_ids[message.model_id]
        except KeyError:
            raise NotFound(f"model id {message.model_id} is not bound in this session") from None

    def _on_ended(self, call: Call, ending: Ending) -> None:
        if self.is_closed:
            return ending.outcome.discard()
        request = call.member.request
        self._calls.pop(request.call, None)
        if ending.outcome.error is not None:
            return self._respond_failure(request.call, request.request_id, ending.outcome.error)
        spec = call.served.spec
        response = pb.InferResponse(
            call=request.call,
            request_id=request.request_id,
            final=True,
            model_name=spec.model,
            model_version=spec.version,
            outputs=ending.outcome.outputs,
            timing=pb.Timing(
                queue_ns=ending.queue_ns,
                input_copy_ns=ending.input_copy_ns,
                compute_ns=ending.compute_ns,
                output_copy_ns=ending.output_copy_ns,
                batch_rows=ending.batch_rows if spec.batch_rows_max else 0,
                transport="lane",
                copies=ending.outcome.copies,
            ),
        )
        self._send_new_chunks()
        # As a field of LaneResponse, without a copy of the response made for it.
        body = response.SerializeToString()
        packet = _INFER_KEY + packets.varint(len(body)) + body
        if len(packet) > self._limits.packet_bytes_max:
            ending.outcome.discard()
            error = ResourceExhausted(
                f"the response without its tensors has {len(packet)} bytes, a packet of the lane "
                f"takes {self._limits.packet_bytes_max}; ask for fewer outputs, or for raw ones"
            )
            return self._respond_failure(request.call, request.request_id, error)
        self._outbox.send(packet)

    def _respond_failure(self, call: int, request_id: str, error: ThirdrailError) -> None:
        message = error.message
        if len(message) > ERROR_TEXT_CHARS_MAX:
            message = f"{message[:ERROR_TEXT_CHARS_MAX]}..."
        status = pb.Status(reason=error.reason, message=message)
        response = pb.InferResponse(
            call=call, request_id=request_id[:REQUEST_ID_CHARS_MAX], final=True, status=status
        )
        self._send(lane_pb2.LaneResponse(infer=response))

    # Memory

    def _on_grow(self, size: int) -> None:
        if self._is_growing:
            return self.goodbye(InvalidArgument("input memory is asked for twice at a time"))
        self._is_growing = True
        growing = self._loop.run_in_executor(None, self._input.grow, size)
        growing.add_done_callback(lambda done: self._on_grown(size, done))

    def _on_grown(self, size: int, growing: "asyncio.Future[NewChunk]") -> None:
        self._is_growing = False
        try:
            chunk = growing.result()
        except (ThirdrailError, OSError) as error:
            refused = lane_pb2.GrowRefused(size=size, message=str(error))
            return self._send(lane_pb2.LaneResponse(grow_refused=refused))
        if self.is_closed:
            self._input.close()
            return chunk.close()
        self._send_chunk(chunk)

    def _send_new_chunks(self) -> None:
        for chunk in self._output.take_new_chunks():
            self._send_chunk(chunk)

    def _send_chunk(self, chunk: NewChunk) -> None:
        packet = lane_pb2.LaneResponse(chunk=chunk.message).SerializeToString()
        self._outbox.send(packet, [chunk.fd])

    def _send(self, message: lane_pb2.LaneResponse) -> None:
        with contextlib.suppress(OSError):
            self._outbox.send(message.SerializeToString())
