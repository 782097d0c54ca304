# SPDX-License-Identifier: Apache-2.0
"""How a failure leaves over KServe: its text, its status, and the fixed answer to our own bugs."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, TypeVar

import grpc

from thirdrail.errors import InvalidArgument, ThirdrailError, error_of_reason
from thirdrail.statuses import REASONS
from thirdrail.v1 import inference_pb2

_log = logging.getLogger(__name__)

INTERNAL_TEXT = "internal error"

# A status travels in HTTP/2 trailers, which peers bound to 8 KiB, and percent-encoded: three bytes
# for each that is not printable ASCII. Instead of longer ones a peer sees an error of its runtime.
_TEXT_BYTES_MAX = 4096

Context = grpc.aio.ServicerContext[Any, Any]
_Servicer = TypeVar("_Servicer")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def error_of(status: inference_pb2.Status) -> ThirdrailError:
    """The exception for a failed response."""
    return error_of_reason(status.reason, status.message)


def named(error: ThirdrailError, request_id: str) -> ThirdrailError:
    """The same error; one about a request's content says which request, as Triton's do."""
    if request_id and isinstance(error, InvalidArgument):
        return InvalidArgument(f"[request id: {request_id}] {error.message}")
    return error


def text_of(error: ThirdrailError) -> str:
    """The error's text, cut to what a status can carry."""
    text = error.message
    if len(text) <= _TEXT_BYTES_MAX // 12:  # short even if every character needed 12 bytes
        return text
    budget = _TEXT_BYTES_MAX
    for index, character in enumerate(text):
        budget -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if budget < 0:
            return text[:index] + "..."
    return text


async def abort(context: Context, error: ThirdrailError) -> None:
    """Ends the call with the error's KServe status. Never returns: raises AbortError."""
    await context.abort(REASONS[error.reason].kserve_status, text_of(error))


def answering(
    method: Callable[Concatenate[_Servicer, _Request, Context, ...], Awaitable[_Response]],
) -> Callable[[_Servicer, _Request, Context], Awaitable[_Response]]:
    """Wraps a servicer's method: a ThirdrailError becomes its status, the unexpected a fixed text.

    The unexpected is logged with its traceback; nothing of it goes to the caller.
    """

    @functools.wraps(method)
    async def answer(self: _Servicer, request: _Request, context: Context) -> _Response:
        try:
            return await method(self, request, context)
        except ThirdrailError as error:
            await abort(context, error)
            raise AssertionError("abort returned") from error
        except grpc.aio.AbortError:
            raise
        except Exception:
            _log.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)
            raise AssertionError("abort returned") from None

    return answer
