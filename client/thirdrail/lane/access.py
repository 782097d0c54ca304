# SPDX-License-Identifier: Apache-2.0
"""From a gRPC connection to a session on the lane, for threads: when, how, and why not."""

import threading
import time
from typing import TYPE_CHECKING

import grpc

from thirdrail.errors import Cancelled, Unavailable
from thirdrail.failures import WAS_CLOSED, rpc_errors
from thirdrail.lane import attach
from thirdrail.transport import CannotAttach, LaneRule, Transport
from thirdrail.v1 import sessions_pb2
from thirdrail.v1.sessions_pb2_grpc import SessionsStub

if TYPE_CHECKING:  # needs Linux
    from thirdrail.lane.blocking import BlockingLane


class LaneAccess:
    """The way onto the lane of one worker. Sessions are opened by calls that want one.

    address: the gRPC target that `service` calls.
    worker: empty for the server's first.
    """

    def __init__(
        self,
        rule: LaneRule,
        address: str,
        service: SessionsStub,
        *,
        busy_poll_us: int,
        is_debug: bool,
        worker: str = "",
    ) -> None:
        self._rule = rule
        self._address = address
        self._service = service
        self._busy_poll_us = busy_poll_us
        self._is_debug = is_debug
        self._lane: BlockingLane | None = None
        self._worker = worker
        self.workers: tuple[str, ...] = ()  # of the server; none: it was not asked yet
        self._path = ""
        self._has_left = False
        self._attaching = threading.Lock()

    def lane(self) -> "BlockingLane | None":
        """The lane for a call, attached if it is time to; None: the call goes over gRPC.

        Raises Unreachable when no server answers, and why not where the rule wants nothing else.
        """
        lane = self._lane
        if lane is not None and not lane.has_ended:
            return lane
        if not self._rule.is_due(time.monotonic()):
            return None
        with self._attaching:
            if self._lane is not None and not self._lane.has_ended:
                return self._lane  # another thread was faster
            if not self._rule.is_due(time.monotonic()):
                return None
            return self._attach()

    @property
    def calls_in_flight(self) -> int:
        return 0 if self._lane is None else self._lane.talk.calls_in_flight

    @property
    def transport(self) -> Transport:
        lane = self._lane
        if lane is None:
            return self._rule.over_grpc(self._address)
        if lane.has_ended:
            reason = self._rule.reason or f"{lane.end_reason}; the next call attaches anew"
            return Transport(self._rule.over_grpc(self._address).name, self._address, reason)
        return Transport("lane", self._path, "")

    def leave(self) -> None:
        """End the session, if there is one. Calls in flight end with Cancelled. There will be no
        other.
        """
        self._has_left = True
        if self._lane is not None:
            self._lane.close(Cancelled(WAS_CLOSED))

    def _attach(self) -> "BlockingLane | None":
        if self._lane is not None and self._lane.talk.ended is None:  # it is garbage
            self._lane.close(Unavailable(self._lane.end_reason))
        try:
            self._lane = self._attached()
        except CannotAttach as why:
            self._rule.failed(why, time.monotonic())
            return None
        if self._has_left:  # meanwhile: whoever closes may not have seen this lane
            self._lane.close(Cancelled(WAS_CLOSED))
            raise Cancelled(WAS_CLOSED)
        self._rule.attached()
        return self._lane

    def _attached(self) -> "BlockingLane":
        attach.check_platform()
        from thirdrail.lane.hello import attach_lane

        request = sessions_pb2.OpenSessionRequest(worker=self._worker)
        with rpc_errors(self._address):
            try:
                opened = self._service.OpenSession(request, timeout=attach.OPEN_TIMEOUT_S)
            except grpc.RpcError as error:
                raise attach.cannot_open(error, self._address) from None
        self.workers = tuple(opened.workers)
        sock = attach.connect(self._address, opened)
        self._path = sock.getpeername()
        return attach_lane(
            sock,
            opened.token,
            client_name=attach.client_name(),
            busy_poll_us=self._busy_poll_us,
            is_debug=self._is_debug,
        )
