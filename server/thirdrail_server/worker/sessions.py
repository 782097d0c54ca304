# SPDX-License-Identifier: Apache-2.0
"""All lane sessions of one worker: who may come in, how many, and what they all hold."""

import asyncio
import itertools
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

from thirdrail.errors import ResourceExhausted, ThirdrailError, TimedOut, Unavailable
from thirdrail.lane.memory import create_chunk
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2, metrics_pb2, sessions_pb2
from thirdrail_engines import cuda_engines
from thirdrail_engines.engine import DeviceLost
from thirdrail_server.config import WorkerConfig
from thirdrail_server.control_messages import OpenedSession
from thirdrail_server.worker.arena_ledger import ArenaLedger
from thirdrail_server.worker.chunks import MakeChunk
from thirdrail_server.worker.device_regions import DeviceRegions
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.farewells import Farewells
from thirdrail_server.worker.huge_pages import HugePages
from thirdrail_server.worker.janitor import Janitor
from thirdrail_server.worker.lane_device import LaneDevice
from thirdrail_server.worker.lane_session import LaneSession
from thirdrail_server.worker.listener import Listener
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.peers import Peer, credentials_of
from thirdrail_server.worker.served_version import OnDeviceLost
from thirdrail_server.worker.session_calls import STOPPING
from thirdrail_server.worker.tokens import TokenTable

S = 1_000_000_000  # nanoseconds
DRAIN_LOOK_S = 0.01


class SessionTable:
    """Lives on the worker's loop, from its start to its end."""

    def __init__(
        self,
        config: WorkerConfig,
        models: ModelTable,
        on_device_lost: OnDeviceLost = lambda error: None,
    ) -> None:
        """on_device_lost: called on the loop, maybe more than once."""
        self.models = models
        self.on_device_lost = on_device_lost
        self.limits = config.lane
        self.quarantine_s = config.sessions.quarantine_ms / 1000
        self.janitor = Janitor()
        self.farewells = Farewells()
        self.ledger = ArenaLedger(config.sessions)
        self.lane_device = LaneDevice(config)
        self.exports = ExportDesk(config.exports, self.janitor, self._tell, self._charge_shared)
        self.make_chunk: MakeChunk = create_chunk
        if config.sessions.huge_pages:
            self.make_chunk = HugePages().create_chunk
        self.regions = DeviceRegions(lambda: cuda_engines.own_device(config.device))
        self._config = config.sessions
        self._numbers = itertools.count(1)
        self._tokens = TokenTable(
            config.sessions.tokens_pending_max, config.sessions.token_life_ms, secrets.token_bytes
        )
        self._sessions: dict[int, LaneSession] = {}  # by number, until they are freed
        self._connecting: dict[LaneSession, asyncio.TimerHandle | None] = {}  # no hello yet
        self._refused: Counter[int] = Counter()  # attaches, by reason
        self._listener: Listener | None = None
        self._is_stopping = False

    # Clients that come

    def inherit(self, sock: socket.socket, *, is_front: bool) -> None:
        """A lane whose client started this process."""
        peer = credentials_of(sock)
        session = LaneSession(sock, self, peer, is_front=is_front, is_inherited=True)
        self._connecting[session] = None  # it may take its time

    def listen(self, sock: socket.socket) -> None:
        """Take clients from a listening socket."""
        uids = (os.geteuid(),) if self._config.uids == () else self._config.uids
        self._listener = Listener(sock, uids, self._on_client, self._count_refusal, self.farewells)

    def open(self) -> OpenedSession:
        """Expect a client. Raises ResourceExhausted when there are too many already."""
        if self._is_stopping:
            raise Unavailable(STOPPING)
        self._require_room()
        number = next(self._numbers)
        token = self._tokens.issue(number, time.monotonic_ns())
        return OpenedSession(number, token, self._config.token_life_ms)

    def _on_client(self, sock: socket.socket, peer: Peer) -> None:
        # Honest clients say hello at once: where too many have not, the oldest one is none of them.
        strangers = [each for each in self._connecting if not each.is_inherited]
        if len(strangers) >= self._config.tokens_pending_max:
            strangers[0].goodbye(ResourceExhausted("too many clients have not said hello"))
        session = LaneSession(sock, self, peer)
        self._connecting[session] = asyncio.get_running_loop().call_later(
            self._config.hello_ms_max / 1000,
            session.goodbye,
            TimedOut(f"no hello came within {self._config.hello_ms_max} ms"),
        )

    def _count_refusal(self, error: ThirdrailError) -> None:
        self._refused[error.reason] += 1

    # What sessions ask for: see lane_session.Host

    def admit(self, session: LaneSession, hello: lane_pb2.Hello) -> int:
        try:
            number = self._number_for(session, hello)
        except ThirdrailError as error:
            self._count_refusal(error)
            raise
        timer = self._connecting.pop(session)
        if timer is not None:
            timer.cancel()
        self._sessions[number] = session
        return number

    def _number_for(self, session: LaneSession, hello: lane_pb2.Hello) -> int:
        if session.is_inherited:
            return next(self._numbers)
        issued = self._tokens.redeem(hello.token, time.monotonic_ns())
        self._require_room()
        same_uid = sum(each.peer.uid == session.peer.uid for each in self._counted())
        if same_uid >= self._config.sessions_per_uid_max:
            raise ResourceExhausted(
                f"uid {session.peer.uid} has {same_uid} sessions, the most that one may have; the "
                "operator sets it with --max-sessions-per-uid"
            )
        return issued.session

    def freed(self, session: LaneSession) -> None:
        self._sessions.pop(session.number, None)
        timer = self._connecting.pop(session, None)
        if timer is not None:
            timer.cancel()

    def _tell(self, number: int, message: lane_pb2.LaneResponse) -> None:
        session = self._sessions.get(number)
        if session is not None:
            session.tell(message)

    def _charge_shared(self, number: int, size: int, *, is_new: bool) -> None:
        session = self._sessions.get(number)
        if session is not None:
            session.memory.charge_shared(size, is_new=is_new)

    def _require_room(self) -> None:
        count = sum(1 for _ in self._counted())
        if count >= self._config.sessions_max:
            raise ResourceExhausted(
                f"{count} sessions are attached, the most there may be; the operator sets it with "
                "--max-sessions"
            )

    def _counted(self) -> Iterator[LaneSession]:
        """Those that the limits are about, also in quarantine: their clients still have memory."""
        return (each for each in self._sessions.values() if not each.is_inherited)

    # What the front asks for: see control.Sessions

    async def open_region(self, number: int, handle: bytes, size: int) -> None:
        """See DeviceRegions.open. Raises Unavailable when the device is lost, and this process."""
        await self._on_device(lambda: self.regions.open(number, handle, size))

    async def close_region(self, number: int) -> None:
        """See DeviceRegions.close. The driver may wait for the device."""
        await self._on_device(lambda: self.regions.close(number))

    async def _on_device(self, act: Callable[[], None]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, act)
        except DeviceLost as error:
            self.on_device_lost(error)
            raise Unavailable(str(error)) from None

    # Figures

    def infos(self) -> list[sessions_pb2.SessionInfo]:
        now_ns = time.monotonic_ns()
        opening = [
            sessions_pb2.SessionInfo(
                session=each.session,
                state=sessions_pb2.SESSION_STATE_OPENING,
                age_s=(now_ns - each.issued_ns) / S,
            )
            for each in self._tokens.pending(now_ns)
        ]
        return [each.info(now_ns) for each in self._sessions.values()] + opening

    def describe(self, status: metrics_pb2.WorkerStatus) -> None:
        """Fill in what the worker's status says of sessions."""
        infos = [each.info(0) for each in self._sessions.values()]
        status.sessions = len(infos) + len(self._connecting)
        status.sessions_ended = sum(not each.life.is_open for each in self._sessions.values())
        status.input_bytes = sum(each.input_bytes for each in infos)
        status.output_bytes = sum(each.output_bytes for each in infos)
        shared_bytes = sum(each.shared_bytes for each in infos)
        status.arena_bytes = status.input_bytes + status.output_bytes + shared_bytes
        status.leases = sum(each.leases for each in infos)
        status.leased_bytes = sum(each.leased_bytes for each in infos)
        status.shared_bytes = self.exports.registry.total_bytes
        for reason, clients in sorted(self._refused.items()):
            name = pb.Reason.Name(pb.Reason.ValueType(reason)).removeprefix("REASON_")
            status.attach_refusals.add(reason=name, clients=clients)

    async def stop(self, drain_s_max: float) -> None:
        """Take no new clients and calls, let what is in flight finish within the bound, and say
        goodbye. The front's own lane goes on.
        """
        self._is_stopping = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        here = (*self._sessions.values(), *self._connecting)
        leaving = [each for each in here if not each.is_inherited]
        for session in leaving:
            session.stop()
        ends_s = time.monotonic() + drain_s_max
        while leaving:
            is_over = time.monotonic() >= ends_s
            for session in [each for each in leaving if is_over or each.is_idle]:
                session.goodbye(Unavailable(STOPPING))
                leaving.remove(session)
            await asyncio.sleep(DRAIN_LOOK_S if leaving else 0)

    def close(self) -> None:
        """End all of them; nobody waits for anything."""
        if self._listener is not None:
            self._listener.close()
        self.exports.close()
        self.farewells.close()
        for session in [*self._sessions.values(), *self._connecting]:
            session.end(has_let_go=True)
