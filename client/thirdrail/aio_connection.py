# SPDX-License-Identifier: Apache-2.0
"""What an AsyncClient has open in one event loop: a channel, the services on it, and the lanes."""

import asyncio
import os
import weakref
from typing import TYPE_CHECKING, Any, cast

import grpc

from thirdrail import health
from thirdrail.errors import FailedPrecondition
from thirdrail.lane.aio_access import AsyncAccess
from thirdrail.lanes import Lanes
from thirdrail.transport import LaneRule
from thirdrail.v1 import inference_pb2_grpc, metrics_pb2_grpc, models_pb2_grpc, sessions_pb2_grpc

if TYPE_CHECKING:  # the asynchronous stubs exist for the type checker only
    from thirdrail.v1.inference_pb2_grpc import InferenceAsyncStub
    from thirdrail.v1.metrics_pb2_grpc import MetricsAsyncStub
    from thirdrail.v1.models_pb2_grpc import ModelsAsyncStub
    from thirdrail.v1.sessions_pb2_grpc import SessionsAsyncStub


class AsyncConnection:
    """Belongs to the process and the event loop that made it."""

    def __init__(
        self, address: str, channel: grpc.aio.Channel, rule: LaneRule, *, is_debug: bool
    ) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self.address = address
        self._channel = channel
        self.inference = cast("InferenceAsyncStub", inference_pb2_grpc.InferenceStub(channel))
        self.models = cast("ModelsAsyncStub", models_pb2_grpc.ModelsStub(channel))
        self.metrics = cast("MetricsAsyncStub", metrics_pb2_grpc.MetricsStub(channel))
        self.check: Any = channel.unary_unary(
            health.CHECK_METHOD, health.encode_request, health.decode_response
        )
        sessions = cast("SessionsAsyncStub", sessions_pb2_grpc.SessionsStub(channel))

        def access_to(worker: str) -> AsyncAccess:
            its_rule = LaneRule(rule.choice) if worker else rule
            return AsyncAccess(its_rule, address, sessions, is_debug=is_debug, worker=worker)

        self.lanes = Lanes(access_to)
        _OPEN.add(self)

    @property
    def access(self) -> AsyncAccess:
        """To the server's first worker."""
        return self.lanes.home

    @property
    def is_ours(self) -> bool:
        """Whether this process and the running loop may use it."""
        return self._pid == os.getpid() and self._loop is asyncio.get_running_loop()

    def forget(self) -> None:
        """Another loop goes on, and its channel ended with its own; a parent's is left alone."""
        if self._pid == os.getpid():
            _OPEN.discard(self)
            self.lanes.leave()

    async def close(self) -> None:
        """Calls in flight end with Cancelled."""
        if self._pid != os.getpid():
            return  # the parent's
        _OPEN.discard(self)
        self.lanes.leave()
        await self._channel.close()


# What is open, so that a forked child can tell: grpc.aio does not start again in the child of a
# process that uses it, and calls there would hang.
_OPEN: weakref.WeakSet[AsyncConnection] = weakref.WeakSet()


def require_no_fork() -> None:
    """Raises FailedPrecondition in the child of a process that uses grpc.aio."""
    pid = os.getpid()
    if any(connection._pid != pid for connection in _OPEN):
        raise FailedPrecondition(
            "an AsyncClient was open when this process was forked, and grpc.aio cannot start "
            "again here: close it before the fork, spawn the process, or use Client"
        )
