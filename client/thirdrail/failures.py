# SPDX-License-Identifier: Apache-2.0
"""Turns a failed gRPC call into one of our exceptions, with a note on what to do about it.

`str(error)` stays the server's own text. The advice is a note (PEP 678), so a traceback prints it
below.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import grpc

from thirdrail import errors, statuses
from thirdrail.errors import ThirdrailError
from thirdrail.statuses import REASON_KEY
from thirdrail.v1 import inference_pb2 as pb

IS_CLOSED = "this client is closed"  # when a call begins
WAS_CLOSED = "the client was closed"  # while it was on its way
START_A_SERVER = "start a server with: thirdrail serve REPOSITORY"
CHECK_TLS = (
    "something listens there and hung up: it is stopping, or TLS is on at one end only, or the "
    "certificates do not fit (thirdrail --tls-ca FILE, TlsOptions)"
)
STANDS_STILL = "something listens there and says nothing: a server that stands still, or no server"
_MEANINGS = {  # of gRPC's words, where it says no more
    "socket closed": CHECK_TLS,
    "handshake": CHECK_TLS,
    "verification": CHECK_TLS,
    "timed out before receiving settings": STANDS_STILL,
}
# gRPC's words for HTTP/2's REFUSED_STREAM (RFC 9113, section 7): a server is there, and too busy.
_REFUSED_STREAM = "RST_STREAM with error code 7"
_CHANNEL_CLOSED = "Channel closed!"  # its blocking channel's words, by which it ends its calls
_ON_A_CLOSED_CHANNEL = ("Cannot invoke RPC", "Channel is closed")  # and where it has no class

Metadata = Sequence[tuple[str, str | bytes]]


@runtime_checkable
class EndedCall(Protocol):
    """How a call ended: the part that gRPC's blocking and asyncio errors and futures share."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class Unreachable(errors.Unavailable):
    """No server answered: none is running, the address is wrong, or the connection broke."""


_NOTES: dict[type[ThirdrailError], str] = {
    errors.NotFound: "`thirdrail models` lists what this server has",
    errors.PermissionDenied: (
        "loading and unloading need the server's --model-control explicit, and its owner's uid on "
        "the Unix socket or a client certificate over TCP"
    ),
    errors.Unimplemented: "the server is another program, or older than this client",
    errors.QueueFull: "send fewer requests at a time, or raise the model's max_queue_size",
    errors.ResourceExhausted: "ask for less at a time, or raise the server's limit that is named",
    errors.Unavailable: "try again later; `thirdrail models` shows the state of every model",
    errors.TimedOut: "give it a longer timeout, or send fewer requests at a time",
    errors.Internal: "the server's log has the details",
    Unreachable: START_A_SERVER,
}


def not_ready(timeout: float, fault: str) -> errors.TimedOut:
    """Of a wait for a server or model. timeout: seconds. fault: what was seen last."""
    error = errors.TimedOut(f"not ready within {timeout:g} s: {fault}")
    error.add_note("where a server runs, `thirdrail models` shows every model's state, and why")
    return error


def with_note(error: ThirdrailError) -> ThirdrailError:
    """The error with the advice for its class, where there is any."""
    note = _NOTES.get(type(error))
    if note:
        error.add_note(note)
    return error


def anew(error: ThirdrailError) -> ThirdrailError:
    """A copy to raise, of an error that is kept: with each raise one keeps more frames, and in them
    its callers' arrays.
    """
    made = type(error)(error.message)
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made


def error_of_status(status: pb.Status) -> ThirdrailError:
    """The exception for a failure that came in band, on a stream."""
    return with_note(errors.error_of_reason(status.reason, status.message))


def error_of_call(
    status: grpc.StatusCode,
    details: str,
    metadata: Metadata,
    *,
    address: str,
    timeout: float | None,
) -> ThirdrailError:
    """The exception for a call that failed.

    Our server names the exact reason in the trailing metadata. Without it the status came from the
    gRPC runtime or from something in between, and UNAVAILABLE means that nobody was reached.
    """
    reason = dict(metadata).get(REASON_KEY)
    if isinstance(reason, str) and reason in pb.Reason.keys():  # noqa: SIM118 an enum wrapper, not a dict
        return with_note(errors.error_of_reason(pb.Reason.Value(reason), details))
    if status is grpc.StatusCode.UNAVAILABLE:
        return _refused() if _REFUSED_STREAM in details else _unreachable(address, details)
    if status is grpc.StatusCode.CANCELLED and details == _CHANNEL_CLOSED:
        return errors.Cancelled(WAS_CLOSED)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        return with_note(errors.TimedOut(f"no answer within {timeout:g} s"))
    return with_note(statuses.error_of_status(status, details))


def _refused() -> ThirdrailError:
    error = errors.ResourceExhausted(
        "too many calls wait at the server, which did not take this one"
    )
    error.add_note("wait for answers, or use a stream: it holds back who sends too much")
    return error


def _unreachable(address: str, details: str) -> ThirdrailError:
    error = Unreachable(f"no server answers at {address}: {details}")
    said = details.lower()
    error.add_note(next((_MEANINGS[words] for words in _MEANINGS if words in said), START_A_SERVER))
    return error


@contextmanager
def rpc_errors(address: str, timeout: float | None = None) -> Iterator[None]:
    """Raises what gRPC raises inside as one of our exceptions. Fits around awaits as well, which
    grpc.aio cancels when their channel is closed. Calls that begin afterwards are Cancelled too.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise errors.Cancelled(WAS_CLOSED) from None
    except grpc.RpcError as error:
        raise error_of_ended_call(error, address=address, timeout=timeout) from None
    except (ValueError, grpc.aio.UsageError) as error:  # of the blocking channel, of grpc.aio's
        if not str(error).startswith(_ON_A_CLOSED_CHANNEL):
            raise
        raise errors.Cancelled(WAS_CLOSED) from None


def error_of_ended_call(
    call: EndedCall | grpc.RpcError, *, address: str, timeout: float | None
) -> ThirdrailError:
    """The exception for a call that has ended with another status than OK."""
    assert isinstance(call, EndedCall), "gRPC's errors say how the call ended"
    return error_of_call(
        call.code(),
        call.details() or "",
        tuple(call.trailing_metadata() or ()),
        address=address,
        timeout=timeout,
    )
