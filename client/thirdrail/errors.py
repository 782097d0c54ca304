# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, and whose turn it is to act.

Three kinds: CallerError (the same request will fail again), NotNow (try later or ask for less) and
ServerFault (ours). REASONS is the only place where a reason meets an exception class and a gRPC
status.
"""

from dataclasses import dataclass
from typing import ClassVar

import grpc

from thirdrail.v1 import inference_pb2 as pb

# Beside a failed call's status, the Reason's name: two reasons may share a status, and a status
# without this key did not come from our server.
REASON_KEY = "thirdrail-reason"


class ThirdrailError(Exception):
    """A request failed. Its text is the server's: who is wrong, what was expected, what came."""

    reason: ClassVar[pb.Reason.ValueType] = pb.REASON_INTERNAL

    @property
    def message(self) -> str:
        return str(self)


class CallerError(ThirdrailError):
    """The request is at fault: sent again unchanged, it will fail again."""


class NotNow(ThirdrailError):
    """The request is fine but cannot be served now: try later, ask for less, or allow more time."""


class ServerFault(ThirdrailError):
    """The server is at fault. Its log has the details under the request's id."""


class InvalidArgument(CallerError):
    """Names, types, shapes or bytes do not fit the model."""

    reason = pb.REASON_INVALID_ARGUMENT


class NotFound(CallerError):
    """No such model, version or call."""

    reason = pb.REASON_NOT_FOUND


class AlreadyExists(CallerError):
    """The name or number is taken."""

    reason = pb.REASON_ALREADY_EXISTS


class FailedPrecondition(CallerError):
    """The thing referred to has changed or gone, e.g. a stale memory reference."""

    reason = pb.REASON_FAILED_PRECONDITION


class PermissionDenied(CallerError):
    """This caller may not do that over this connection."""

    reason = pb.REASON_PERMISSION_DENIED


class Unimplemented(CallerError):
    """This server does not do that."""

    reason = pb.REASON_UNIMPLEMENTED


class QueueFull(NotNow):
    """The model's queue is full; it would rather refuse than grow."""

    reason = pb.REASON_QUEUE_FULL


class ResourceExhausted(NotNow):
    """A limit on memory or calls in flight is reached."""

    reason = pb.REASON_RESOURCE_EXHAUSTED


class Unavailable(NotNow):
    """The server, its worker or the model is not there at the moment."""

    reason = pb.REASON_UNAVAILABLE


class TimedOut(NotNow):
    """The request's timeout or deadline passed before it was answered."""

    reason = pb.REASON_TIMED_OUT


class Cancelled(NotNow):
    """The caller, or its connection, gave up."""

    reason = pb.REASON_CANCELLED


class Internal(ServerFault):
    """An unexpected failure in the server or in the model's engine."""

    reason = pb.REASON_INTERNAL


@dataclass(frozen=True, slots=True)
class ReasonRow:
    error: type[ThirdrailError]
    status: grpc.StatusCode  # of the native services
    kserve_status: (
        grpc.StatusCode
    )  # of inference.GRPCInferenceService, as Triton's clients expect it


_S = grpc.StatusCode
REASONS: dict[pb.Reason.ValueType, ReasonRow] = {
    row.error.reason: row
    for row in (
        ReasonRow(InvalidArgument, _S.INVALID_ARGUMENT, _S.INVALID_ARGUMENT),
        ReasonRow(NotFound, _S.NOT_FOUND, _S.NOT_FOUND),
        ReasonRow(AlreadyExists, _S.ALREADY_EXISTS, _S.ALREADY_EXISTS),
        ReasonRow(FailedPrecondition, _S.FAILED_PRECONDITION, _S.INVALID_ARGUMENT),
        ReasonRow(PermissionDenied, _S.PERMISSION_DENIED, _S.PERMISSION_DENIED),
        ReasonRow(Unimplemented, _S.UNIMPLEMENTED, _S.UNIMPLEMENTED),
        ReasonRow(Internal, _S.INTERNAL, _S.INTERNAL),
        ReasonRow(Unavailable, _S.UNAVAILABLE, _S.UNAVAILABLE),
        ReasonRow(ResourceExhausted, _S.RESOURCE_EXHAUSTED, _S.UNAVAILABLE),
        ReasonRow(QueueFull, _S.RESOURCE_EXHAUSTED, _S.UNAVAILABLE),
        ReasonRow(TimedOut, _S.DEADLINE_EXCEEDED, _S.UNAVAILABLE),
        ReasonRow(Cancelled, _S.CANCELLED, _S.CANCELLED),
    )
}

_BY_STATUS: dict[grpc.StatusCode, type[ThirdrailError]] = {}
for _row in REASONS.values():  # RESOURCE_EXHAUSTED is told apart by reason in band, not by status
    _BY_STATUS.setdefault(_row.status, _row.error)


def error_of_reason(reason: int, message: str) -> ThirdrailError:
    """The exception for a failed response. A reason from a newer server counts as its fault."""
    row = REASONS.get(pb.Reason.ValueType(reason))
    return row.error(message) if row else Internal(f"unknown reason {reason}: {message}")


def error_of_status(status: grpc.StatusCode, message: str) -> ThirdrailError:
    """The exception for a gRPC status, whoever sent it: our server, a proxy or the gRPC runtime."""
    return _BY_STATUS.get(status, Internal)(message)
