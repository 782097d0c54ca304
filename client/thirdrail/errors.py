# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, and whose turn it is to act.

Three kinds: CallerError (the same request will fail again), NotNow (try later or ask for less) and
ServerFault (ours). Which gRPC status stands for which of them is said in `statuses`, which the
worker does without.
"""

from typing import ClassVar

from thirdrail.v1 import inference_pb2 as pb


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
    """The server is at fault. Its log has the details, with the id of a request that had one."""


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


_ERRORS: tuple[type[ThirdrailError], ...] = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    Unimplemented,
    QueueFull,
    ResourceExhausted,
    Unavailable,
    TimedOut,
    Cancelled,
    Internal,
)
_BY_REASON = {error.reason: error for error in _ERRORS}


def error_of_reason(reason: int, message: str) -> ThirdrailError:
    """The exception for a failed response. A reason from a newer server counts as its fault."""
    error = _BY_REASON.get(pb.Reason.ValueType(reason))
    return error(message) if error else Internal(f"unknown reason {reason}: {message}")
