# SPDX-License-Identifier: Apache-2.0
"""The worker's end of one lane: packets in, calls to the models, packets out.

A peer is never trusted: whatever a packet says is checked here or in `requests`. A packet that
makes no sense ends the session with a goodbye that says why; a request that makes no sense is
answered. Every call ends exactly once: with a response, or with the session.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from thirdrail.errors import (
    Internal,
    InvalidArgument,
    ThirdrailError,
    Unimplemented,
)
from thirdrail.lane import packets
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, sessions_pb2
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_server.logs import printable
from thirdrail_server.worker.departure import Departure
from thirdrail_server.worker.device_messages import attached_message, refused_message
from thirdrail_server.worker.janitor import Mapping
from thirdrail_server.worker.negotiation import (
    DEBUG,
    agreed_features,
    agreed_version,
    limits_message,
)
from thirdrail_server.worker.peers import Peer
from thirdrail_server.worker.pings import Pings
from thirdrail_server.worker.session_calls import SessionCalls
from thirdrail_server.worker.session_exports import EXPORT_KINDS
from thirdrail_server.worker.session_host import Host
from thirdrail_server.worker.session_memory import SessionMemory
from thirdrail_server.worker.session_states import Event, Life

log = logging.getLogger(__name__)

PACKETS_PER_WAKEUP_MAX = 8  # then it is the next session's turn: a call may run here at once
CLIENT_NAME_CHARS_MAX = 128
S = 1_000_000_000  # nanoseconds


class LaneSession:
    """One client of the worker. Its end of file, its death, a broken rule or `end` ends it.

    is_inherited: the socket came from the process that started the worker, which needs no token,
        counts for no limit and lets go of its memory when it hangs up.
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
        self.life = Life()
        self._sock = sock
        self._host = host
        self._limits = host.limits
        self._loop = asyncio.get_running_loop()
        # One response for each call in flight and each chunk asked for, and some room for refusals.
        self._outbox = Outbox(
            sock,
            self._loop,
            packets_max=2 * self._limits.calls_in_flight_max,
            fail=self._on_unreachable,
        )
        self.memory = SessionMemory(
            self._outbox, self._limits, host.ledger, host.make_chunk, host.exports
        )
        self._calls = SessionCalls(
            host.models,
            self._limits,
            self._outbox,
            self.memory,
            is_front=is_front,
            regions=host.regions,
            give_up=self.goodbye,
            on_device_lost=host.on_device_lost,
        )
        self._pings = Pings(self.memory, self._send)
        self._is_attached = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_closed = False
        self._loop.add_reader(sock, self._on_readable)
        if peer.pidfd is not None:
            self._loop.add_reader(peer.pidfd, self._on_peer_dead)

    def __str__(self) -> str:
        name = f", '{self.client_name}'" if self.client_name else ""
        return f"session {self.number} ({self.peer}{name})"

    @property
    def uid(self) -> int:
        return self.peer.uid

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
            calls=self._calls.total,
            exports=self.memory.exports.export_count,
            imports=self.memory.exports.import_count,
            shared_bytes=self.memory.exports.charged_bytes,
            device_bytes=self.memory.device_bytes,
            age_s=max(0, now_ns - self.began_ns) / S,
            is_front=self.is_front,
        )

    # Ending

    def stop(self) -> None:
        """Refuse new calls. Those in flight finish: see `is_idle`."""
        self._calls.stop()

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight, and everything is told."""
        return self.is_closed or not (len(self._calls) or self._outbox.waiting)

    def goodbye(self, error: ThirdrailError) -> None:
        """Say why, then end."""
        status = pb.Status(reason=error.reason, message=error.message)
        self._send(lane_pb2.LaneResponse(goodbye=lane_pb2.Goodbye(status=status)))
        self.end(error.message, may_answer=True)

    def end(self, reason: str = "", *, has_let_go: bool = False, may_answer: bool = False) -> None:
        """Take nothing new, cancel what is in flight, drop the results, give the memory back.

        has_let_go: the client does not use the memory any more.
        may_answer: it may still say, or have said, that it has let go.
        """
        if self.is_closed:
            return
        self.is_closed = True
        if reason:
            log.warning("%s ends: %s", self, reason)
        self._loop.remove_reader(self._sock)
        self._outbox.close()
        self._calls.close()
        mappings = self.memory.close()
        has_memory = bool(mappings) or self.memory.exports.holds_memory
        has_let_go |= not has_memory or (self.is_inherited and not may_answer)
        self._depart(mappings, has_let_go, may_answer)

    def _depart(self, mappings: Sequence[Mapping], has_let_go: bool, may_answer: bool) -> None:
        pidfd = self.peer.pidfd
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
        departure = Departure(
            self.life,
            pidfd=pidfd,
            packet_bytes_max=self._limits.packet_bytes_max,
            grace_s=self._host.quarantine_s,
            on_freed=self._on_freed,
        )
        self.life.on(Event.END)
        if has_let_go:
            departure.let_go()
        is_listened_to = may_answer and not has_let_go
        if may_answer and has_let_go:
            self._host.farewells.linger(self._sock)
        elif is_listened_to:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        else:
            self._sock.close()
        departure.begin(mappings, self._host.janitor, self._sock if is_listened_to else None)

    def _on_freed(self) -> None:
        self.memory.close_account()
        self._host.freed(self)

    def _on_unreachable(self, reason: str) -> None:
        """It takes nothing any more; before it hung up it may have said that it lets go. To be gone
        breaks no rule, to read nothing does."""
        is_gone = self._outbox.waiting <= self._outbox.packets_max
        log.debug("%s: %s", self, reason)
        self.end("" if is_gone else reason, may_answer=True)

    def _on_peer_dead(self) -> None:
        self.end(has_let_go=True)

    # Receiving

    def _on_readable(self) -> None:
        try:
            self._read()
        except Exception:  # whose call it was is not known here, and nobody is left waiting
            log.exception("%s: a packet could not be taken", self)
            self.goodbye(Internal("the worker failed to take a packet; its log says why"))

    def _read(self) -> None:
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
                log.debug("%s: receiving failed: %s", self, error.strerror)
                return self.end()
            if not packet:
                return self.end()
            if self._calls.repeat(packet):
                continue
            try:
                message = lane_pb2.LaneRequest.FromString(packet)
            except DecodeError:
                return self.goodbye(
                    InvalidArgument(f"a packet of {len(packet)} bytes is not a LaneRequest")
                )
            self._on_message(message, packet)

    def _on_message(self, message: lane_pb2.LaneRequest, packet: bytes) -> None:
        for lease in message.releases:
            if self.memory.release(lease):
                self._calls.on_device.released()
        kind = message.WhichOneof("message")
        if kind == "infer" and self._is_attached:
            if not self._calls.total:
                self.life.on(Event.USE)
            self._calls.take(message, packet)
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
            self._calls.cancel(message.cancel.call)
        elif kind == "grow":
            self._on_grow(message.grow)
        elif kind == "device":
            self._on_device(message.device)
        elif kind == "ping":
            self._pings.answer(message.ping)
        elif kind == "close":
            self.end(has_let_go=True)
        elif kind in EXPORT_KINDS:
            self.life.on(Event.USE)
            self.memory.exports.take(kind, message)
        else:
            self.goodbye(Unimplemented(f"this worker does not take '{kind}'"))

    def _on_hello(self, hello: lane_pb2.Hello) -> None:
        if self._is_attached:
            return self.goodbye(InvalidArgument("the lane is attached already"))
        try:
            version = agreed_version(hello)
            self.client_name = printable(hello.client_name[:CLIENT_NAME_CHARS_MAX])
            self.number = self._host.admit(self, hello)
        except ThirdrailError as error:
            return self.goodbye(error)
        self.life.on(Event.HELLO)
        self._is_attached = True
        if not self.is_inherited:
            self.memory.open_account(self)
        self.memory.exports.attach(self.number, self.peer.uid)
        self.features = agreed_features(hello)
        self.memory.output.poisons = DEBUG in self.features
        attached = lane_pb2.Attached(
            version=version,
            features=sorted(self.features),
            limits=limits_message(self._limits),
            input_epoch=self.memory.input.epoch,
            output_epoch=self.memory.output.epoch,
            session=self.number,
        )
        self._send(lane_pb2.LaneResponse(attached=attached))

    # Memory

    def _on_grow(self, request: lane_pb2.GrowRequest) -> None:
        self.life.on(Event.USE)
        try:
            self.memory.grow(request, self._unmap, self._host.on_device_lost)
        except ThirdrailError as error:
            self.goodbye(error)

    def _unmap(self, mappings: Sequence[Mapping]) -> None:
        self._host.janitor.unmap(mappings, lambda: None)

    def _on_device(self, request: lane_pb2.DeviceRequest) -> None:
        self.life.on(Event.USE)
        task = self._loop.create_task(self._attach_device(request), name="attach a device")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach_device(self, request: lane_pb2.DeviceRequest) -> None:
        try:
            device = await self.memory.attach_device(
                self._host.lane_device, request.uuid, self.peer.uid
            )
        except DeviceLost as error:
            return self._host.on_device_lost(error)
        except EngineError as error:
            return self.tell(refused_message(request, Internal(str(error))))
        except ThirdrailError as error:
            return self.tell(refused_message(request, error))
        if device is not None:
            message, fds = attached_message(request, device)
            self._outbox.send(message.SerializeToString(), fds)

    def tell(self, message: lane_pb2.LaneResponse) -> None:
        """News that it did not ask for."""
        if not self.is_closed:
            self._send(message)

    def _send(self, message: lane_pb2.LaneResponse) -> None:
        with contextlib.suppress(OSError):
            self._outbox.send(message.SerializeToString())
