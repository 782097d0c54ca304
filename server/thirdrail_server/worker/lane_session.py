# SPDX-License-Identifier: Apache-2.0
"""The worker's end of one lane: packets in, calls to the models, packets out.

A peer is never trusted: whatever a packet says is checked here or in `requests`. A packet that
makes no sense ends the session with a goodbye that says why; a request that makes no sense is
answered. Every call ends exactly once: with a response, or with the session.
"""

import asyncio
import contextlib
import logging
import mmap
import socket
import time
from dataclasses import dataclass
from typing import Protocol

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
from thirdrail.v1 import lane_pb2, sessions_pb2
from thirdrail_server.config import LaneLimits
from thirdrail_server.worker.departure import Departure
from thirdrail_server.worker.execution import Member
from thirdrail_server.worker.janitor import Janitor
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.negotiation import agreed_features, agreed_version, limits_message
from thirdrail_server.worker.peers import Peer
from thirdrail_server.worker.requests import Request, VersionSpec, read_request
from thirdrail_server.worker.served_version import Call, Ending
from thirdrail_server.worker.session_memory import SessionMemory
from thirdrail_server.worker.session_states import Event, Life

log = logging.getLogger(__name__)

PACKETS_PER_WAKEUP_MAX = 64
_INFER_KEY = bytes((2 << 3 | 2,))  # of LaneResponse's field `infer` in the wire format
# A response that carries nothing but these two fits a packet, whatever characters they consist of.
ERROR_TEXT_CHARS_MAX = 4096
REQUEST_ID_CHARS_MAX = 1024
CLIENT_NAME_CHARS_MAX = 128
S = 1_000_000_000  # nanoseconds


class Host(Protocol):
    """The worker around its sessions."""

    models: ModelTable
    limits: LaneLimits
    quarantine_s: float
    janitor: Janitor

    def admit(self, session: "LaneSession", hello: lane_pb2.Hello) -> int:
        """Let a client in: the session's number. Raises PermissionDenied or ResourceExhausted."""
        ...

    def freed(self, session: "LaneSession") -> None:
        """Its memory is given back, and nothing of it is left."""
        ...


@dataclass(frozen=True, slots=True)
class _BoundModel:
    name: str
    version: int


class LaneSession:
    """One client of the worker. Its end of file, its death, a broken rule or `end` ends it.

    is_inherited: the socket came from the process that started the worker, which needs no token and
        whose memory needs no quarantine.
    """

    def __init__(
        self,
        sock: socket.socket,
        host: Host,
        peer: Peer,
        *,
        is_front: bool = False,
        is_inherited: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.peer = peer
        self.is_front = is_front
        self.is_inherited = is_inherited
        self.number = 0  # until the hello
        self.client_name = ""
        self.features: frozenset[str] = frozenset()
        self.began_ns = time.monotonic_ns()
        self.calls_total = 0
        self.life = Life()
        self._sock = sock
        self._host = host
        self._models = host.models
        self._limits = host.limits
        self._loop = asyncio.get_running_loop()
        # One response for each call in flight and each chunk asked for, and some room for refusals.
        self._outbox = Outbox(
            sock, self._loop, packets_max=2 * self._limits.calls_in_flight_max, fail=self.end
        )
        self.memory = SessionMemory(self._outbox, self._limits)
        self._calls: dict[int, Call] = {}
        self._model_ids: dict[int, _BoundModel] = {}
        self._is_attached = False
        self.is_closed = False
        self._loop.add_reader(sock, self._on_readable)
        if peer.pidfd is not None:
            self._loop.add_reader(peer.pidfd, self._on_peer_dead)

    def __str__(self) -> str:
        name = f", '{self.client_name}'" if self.client_name else ""
        return f"session {self.number} ({self.peer}{name})"

    @property
    def calls_in_flight(self) -> int:
        return len(self._calls)

    def info(self, now_ns: int) -> sessions_pb2.SessionInfo:
        """What there is to see of it. now_ns: monotonic, for its age."""
        return sessions_pb2.SessionInfo(
            session=self.number,
            state=sessions_pb2.SessionState.ValueType(self.life.state.value),
            client_name=self.client_name,
            pid=self.peer.pid,
            uid=self.peer.uid,
            input_bytes=self.memory.input.total_bytes,
            output_bytes=self.memory.output.total_bytes,
            leased_bytes=self.memory.output.leased_bytes,
            leases=self.memory.output.leases,
            calls_in_flight=len(self._calls),
            calls=self.calls_total,
            age_s=max(0, now_ns - self.began_ns) / S,
            is_front=self.is_front,
        )

    # Ending

    def goodbye(self, error: ThirdrailError) -> None:
        """Say why, then end."""
        status = pb.Status(reason=error.reason, message=error.message)
        self._send(lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status)))
        self.end(error.message, may_answer=True)

    def end(self, reason: str = "", *, has_let_go: bool = False, may_answer: bool = False) -> None:
        """Take nothing new, cancel what is in flight, drop the results, give the memory back.

        has_let_go: the client does not use the memory any more.
        may_answer: it was told why, and may still say that it has let go.
        """
        if self.is_closed:
            return
        self.is_closed = True
        if reason:
            log.warning("%s ends: %s", self, reason)
        self._loop.remove_reader(self._sock)
        self._outbox.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.cancel()
        mappings = self.memory.close()
        is_harmless = has_let_go or self.is_inherited or not mappings
        self._depart(mappings, is_harmless, may_answer)

    def _depart(self, mappings: list[mmap.mmap], has_let_go: bool, may_answer: bool) -> None:
        pidfd = self.peer.pidfd
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
        departure = Departure(
            self.life,
            pidfd=pidfd,
            packet_bytes_max=self._limits.packet_bytes_max,
            grace_s=self._host.quarantine_s,
            on_freed=lambda: self._host.freed(self),
        )
        self.life.on(Event.END)
        if has_let_go:
            departure.let_go()
        if may_answer and not has_let_go:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            departure.begin(mappings, self._host.janitor, self._sock)
        else:
            self._sock.close()
            departure.begin(mappings, self._host.janitor, None)

    def _on_peer_dead(self) -> None:
        self.end(has_let_go=True)

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
                return self.end(f"receiving failed: {error.strerror}")
            if not packet:
                return self.end()
            try:
                message = lane_pb2.LaneRequest.FromString(packet)
            except DecodeError:
                return self.goodbye(
                    InvalidArgument(f"a packet of {len(packet)} bytes is not a LaneRequest")
                )
            self._on_message(message)

    def _on_message(self, message: lane_pb2.LaneRequest) -> None:
        for lease in message.releases:
            self.memory.release(lease)
        kind = message.WhichOneof("message")
        if kind == "infer" and self._is_attached:
            self._on_infer(message.infer, message.flow if self.is_front else 0)
        elif kind == "hello":
            self._on_hello(message.hello)
        elif not self._is_attached:
            self.goodbye(InvalidArgument(f"the first message must be a hello, got {kind}"))
        elif kind is not None:
            self._on_control(kind, message)
        elif not message.releases:
            self.goodbye(Unimplemented("a packet holds no message that this worker knows"))

    def _on_control(self, kind: str, message: lane_pb2.LaneRequest) -> None:
        """Everything but calls."""
        if kind == "cancel":
            call = self._calls.get(message.cancel.call)
            if call is not None:
                call.cancel()
        elif kind == "grow":
            self._on_grow(message.grow)
        elif kind == "close":
            self.end(has_let_go=True)
        else:
            self.goodbye(Unimplemented(f"this worker does not take '{kind}'"))

    def _on_hello(self, hello: lane_pb2.Hello) -> None:
        if self._is_attached:
            return self.goodbye(InvalidArgument("the lane is attached already"))
        try:
            version = agreed_version(hello)
            self.client_name = hello.client_name[:CLIENT_NAME_CHARS_MAX]
            self.number = self._host.admit(self, hello)
        except ThirdrailError as error:
            return self.goodbye(error)
        self.life.on(Event.HELLO)
        self._is_attached = True
        self.features = agreed_features(hello)
        attached = lane_pb2.Attached(
            version=version,
            features=sorted(self.features),
            limits=limits_message(self._limits),
            input_epoch=self.memory.input.epoch,
            output_epoch=self.memory.output.epoch,
            session=self.number,
        )
        self._send(lane_pb2.LaneResponse(attached=attached))

    # Calls

    def _on_infer(self, message: pb.InferRequest, flow: int) -> None:
        now_ns = time.monotonic_ns()
        if not self.calls_total:
            self.life.on(Event.USE)
        self.calls_total += 1
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
            request = read_request(message, served.spec, self.memory.view)
        except ThirdrailError as error:
            return self._respond_failure(message.call, message.request_id, error)
        member = Member(request, self.memory.output, self._limits.inline_bytes_max)
        ending = served.run_now(member, priority=message.priority, now_ns=now_ns)
        if ending is not None:
            return self._respond(request, served.spec, ending)
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
        self._respond(request, call.served.spec, ending)

    def _respond(self, request: Request, spec: VersionSpec, ending: Ending) -> None:
        outcome = ending.outcome
        if outcome.error is not None:
            return self._respond_failure(request.call, request.request_id, outcome.error)
        response = outcome.response
        response.call = request.call
        if request.request_id:
            response.request_id = request.request_id
        response.final = True
        response.model_name = spec.model
        response.model_version = spec.version
        timing = response.timing
        timing.queue_ns = ending.queue_ns
        timing.input_copy_ns = ending.input_copy_ns
        timing.compute_ns = ending.compute_ns
        timing.output_copy_ns = ending.output_copy_ns
        if spec.batch_rows_max:
            timing.batch_rows = ending.batch_rows
        timing.transport = "lane"
        timing.copies = outcome.copies
        self.memory.send_new_chunks()
        # As a field of LaneResponse, without a copy of the response made for it.
        body = response.SerializeToString()
        packet = _INFER_KEY + packets.varint(len(body)) + body
        if len(packet) > self._limits.packet_bytes_max:
            outcome.discard()
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

    def _on_grow(self, request: lane_pb2.GrowRequest) -> None:
        self.life.on(Event.USE)
        try:
            self.memory.grow(request, self._unmap_late)
        except ThirdrailError as error:
            self.goodbye(error)

    def _unmap_late(self, mapping: mmap.mmap) -> None:
        self._host.janitor.unmap([mapping], lambda: None)

    def _send(self, message: lane_pb2.LaneResponse) -> None:
        with contextlib.suppress(OSError):
            self._outbox.send(message.SerializeToString())
