# SPDX-License-Identifier: Apache-2.0
"""Which way calls take, and why not a better one: the rule that both clients follow, without I/O.

"auto" attaches to the lane where that is possible and uses gRPC elsewhere. It never does so in
silence: `client.transport` has the reason, and the logger "thirdrail" says it once at INFO.
"""

import logging
from dataclasses import dataclass
from typing import Literal

from thirdrail.errors import FailedPrecondition, InvalidArgument, ThirdrailError, Unavailable

TransportChoice = Literal["auto", "lane", "grpc"]
TransportName = Literal["none", "lane", "grpc-unix", "grpc-tcp"]

# When to try the lane again after a failure. What passes (a worker that starts, a limit) is asked
# for often; what stays (an older server, another host) now and then: the server may be replaced.
# A failed try costs one small gRPC call.
ATTACH_AGAIN_SOON_S = 0.5
ATTACH_AGAIN_LATER_S = 30.0

ASKED_FOR_GRPC = "the client was made with transport='grpc'"
_CHOICES = ("auto", "lane", "grpc")
_log = logging.getLogger("thirdrail")


@dataclass(frozen=True, slots=True)
class Transport:
    """What a client's calls travel on. Model control, health and metrics always use gRPC.

    name: "lane", "grpc-unix", "grpc-tcp", or "none" before the first call.
    address: the lane's socket, or the gRPC target.
    reason: why not the lane; empty for the lane.
    """

    name: TransportName
    address: str
    reason: str


LIFETIME_S = 60.0  # of an export that nobody has received


def needs_lane(transport: Transport) -> str:
    """Why tensors cannot be shared with other processes."""
    return f"sharing tensors needs the lane, calls go over {transport.name}: {transport.reason}"


NOTHING_YET = Transport("none", "", "nothing was called yet")


class CannotAttach(Exception):
    """Why this client is not on the lane. `is_passing`: it may be within a second."""

    def __init__(self, reason: str, *, is_passing: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_passing = is_passing

    def as_error(self) -> ThirdrailError:
        """What a client raises that was told to use nothing but the lane."""
        kind = Unavailable if self.is_passing else FailedPrecondition
        return kind(f"cannot use the lane: {self.reason}")


class LaneRule:
    """When to try the lane. Times are seconds of a monotonic clock; not thread-safe.

    Raises InvalidArgument for an unknown choice.
    """

    def __init__(self, choice: TransportChoice = "auto") -> None:
        if choice not in _CHOICES:
            raise InvalidArgument(f"unknown transport {choice!r}, expected one of {_CHOICES}")
        self.choice = choice
        self.reason = ASKED_FOR_GRPC if choice == "grpc" else NOTHING_YET.reason
        self._try_again_at_s = 0.0
        self._told = ""

    def is_due(self, now_s: float) -> bool:
        """Whether the next call should try to attach. Without a lane, "lane" always tries."""
        return self.choice == "lane" or (self.choice == "auto" and now_s >= self._try_again_at_s)

    def failed(self, why: CannotAttach, now_s: float) -> None:
        """Attaching failed: "auto" goes on over gRPC and says so, "lane" raises the error."""
        self.reason = why.reason
        self._try_again_at_s = now_s + (
            ATTACH_AGAIN_SOON_S if why.is_passing else ATTACH_AGAIN_LATER_S
        )
        if self.choice == "lane":
            raise why.as_error() from why
        if self.reason != self._told:
            self._told = self.reason
            _log.info("calls go over gRPC, not over the lane: %s", self.reason)

    def attached(self) -> None:
        """Attached: when this session ends, the next call tries again at once."""
        self.reason = self._told = ""
        self._try_again_at_s = 0.0

    def over_grpc(self, address: str) -> Transport:
        """What a client reports that is not attached."""
        is_unix = address.startswith(("unix:", "unix-abstract:"))
        return Transport("grpc-unix" if is_unix else "grpc-tcp", address, self.reason)
