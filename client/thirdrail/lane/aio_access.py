# SPDX-License-Identifier: Apache-2.0
"""From an event loop's gRPC connection to a session on the lane: when, how, and why not."""

import asyncio
import time
from typing import TYPE_CHECKING

import grpc

from thirdrail.errors import Cancelled
from thirdrail.failures import WAS_CLOSED, rpc_errors
from thirdrail.lane import attach
from thirdrail.transport import CannotAttach, LaneRule, Transport
from thirdrail.v1 import sessions_pb2

if TYPE_CHECKING:  # the stub exists for the type checker only; the session needs Linux
    from thirdrail.lane.aio_session import AsyncSession
    from thirdrail.v1.sessions_pb2_grpc import SessionsAsyncStub


class AsyncAccess:
    """The way onto the lane of one worker. Sessions are opened by calls that want one.

    address: the gRPC target that `service` calls.
    worker: empty for the server's first.
    """

    def __init__(
        self,
        rule: LaneRule,
        address: str,
        service: "SessionsAsyncStub",
        *,
        is_debug: bool,
        worker: str = "",
    ) -> None:
        self._rule = rule
        self._address = address
        self._service = service
        self._is_debug = is_debug
        self._session: AsyncSession | None = None
        self._worker = worker
        self.workers: tuple[str, ...] = ()  # of the server; none: it was not asked yet
        self._path = ""
        self._has_left = False
        self._attaching = asyncio.Lock()

    async def session(self) -> "AsyncSession | None":
        """The session for a call, opened if it is time to; None: the call goes over gRPC.

        Raises Unreachable when no server answers, and why not where the rule wants nothing else.
        """
        session = self._session
        if session is not None and not session.is_closed:
            return session
        if not self._rule.is_due(time.monotonic()):
            return None
        async with self._attaching:
            if self._session is not None and not self._session.is_closed:
                return self._session  # another call was faster
            if not self._rule.is_due(time.monotonic()):
                return None
            return await self._attach()

    @property
    def calls_in_flight(self) -> int:
        return 0 if self._session is None else self._session.calls_in_flight

    @property
    def transport(self) -> Transport:
        session = self._session
        if session is None:
            return self._rule.over_grpc(self._address)
        if session.is_closed:
            reason = self._rule.reason or f"{session.closed.result()}; the next call attaches anew"
            return Transport(self._rule.over_grpc(self._address).name, self._address, reason)
        return Transport("lane", self._path, "")

    def leave(self) -> None:
        """End the session, also when its loop has ended. There will be no other."""
        self._has_left = True
        if self._session is not None:
            self._session.leave()

    async def _attach(self) -> "AsyncSession | None":
        try:
            session = await self._opened()
        except CannotAttach as why:
            self._rule.failed(why, time.monotonic())
            return None
        if self._has_left:
            session.leave()
            raise Cancelled(WAS_CLOSED)
        self._session = session
        self._rule.attached()
        return self._session

    async def _opened(self) -> "AsyncSession":
        attach.check_platform()
        from thirdrail.lane.aio_session import AsyncSession

        request = sessions_pb2.OpenSessionRequest(worker=self._worker)
        with rpc_errors(self._address):
            try:
                opened = await self._service.OpenSession(request, timeout=attach.OPEN_TIMEOUT_S)
            except grpc.RpcError as error:
                raise attach.cannot_open(error, self._address) from None
        self.workers = tuple(opened.workers)
        deadline_s = time.monotonic() + attach.CONNECT_TIMEOUT_S
        while (sock := attach.connect_at_once(self._address, opened)) is None:
            if time.monotonic() >= deadline_s:
                raise attach.queue_is_full(opened)
            await asyncio.sleep(attach.CONNECT_RETRY_S)
        self._path = sock.getpeername()
        return await AsyncSession.open(
            sock, opened.token, attach.client_name(), is_debug=self._is_debug
        )
