# SPDX-License-Identifier: Apache-2.0
"""The one table where a reason for failure meets a gRPC status, natively and for KServe."""

from dataclasses import dataclass

import grpc

from thirdrail.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    ResourceExhausted,
    ThirdrailError,
    TimedOut,
    Unavailable,
    Unimplemented,
)
from thirdrail.v1 import inference_pb2 as pb

# Beside a failed call's status, the Reason's name: two reasons may share a status, and a status
# without this key did not come from our server.
REASON_KEY = "thirdrail-reason"


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


def error_of_status(status: grpc.StatusCode, message: str) -> ThirdrailError:
    """The exception for a gRPC status, whoever sent it: our server, a proxy or the gRPC runtime."""
    return _BY_STATUS.get(status, Internal)(message)
