# SPDX-License-Identifier: Apache-2.0
"""What a Client has open in one process: a channel, the services on it, and the lanes."""

import os
from typing import Any

import grpc

from thirdrail import health
from thirdrail.lane.access import LaneAccess
from thirdrail.lanes import Lanes
from thirdrail.telling import Teller
from thirdrail.transport import LaneRule
from thirdrail.v1 import inference_pb2_grpc, metrics_pb2_grpc, models_pb2_grpc, sessions_pb2_grpc


class Connection:
    """Belongs to the process that made it."""

    def __init__(
        self,
        address: str,
        channel: grpc.Channel,
        rule: LaneRule,
        *,
        busy_poll_us: int,
        is_debug: bool,
    ) -> None:
        self.pid = os.getpid()
        self.address = address
        self.teller = Teller()
        self._channel = channel
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.models = models_pb2_grpc.ModelsStub(channel)
        self.metrics = metrics_pb2_grpc.MetricsStub(channel)
        self.check: Any = channel.unary_unary(
            health.CHECK_METHOD, health.encode_request, health.decode_response
        )
        sessions = sessions_pb2_grpc.SessionsStub(channel)

        def access_to(worker: str) -> LaneAccess:
            return LaneAccess(
                LaneRule(rule.choice) if worker else rule,
                address,
                sessions,
                busy_poll_us=busy_poll_us,
                is_debug=is_debug,
                worker=worker,
            )

        self.lanes = Lanes(access_to)

    @property
    def access(self) -> LaneAccess:
        """To the server's first worker."""
        return self.lanes.home

    def close(self) -> None:
        """Calls in flight end with Cancelled."""
        if self.pid != os.getpid():
            return  # the parent's
        self._channel.close()  # first: nobody gets onto a lane from here on
        self.lanes.leave()
