# SPDX-License-Identifier: Apache-2.0
"""Failures on their way out of the native services: status, text, and the exact reason."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from thirdrail.errors import Internal, ThirdrailError
from thirdrail.statuses import REASON_KEY, REASONS
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.front.kserve.status import text_of

log = logging.getLogger(__name__)

INTERNAL_TEXT = "internal error; the server's log has it"

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


async def abort_with(context: Context, error: ThirdrailError) -> NoReturn:
    """End the call with the error's status."""
    key = (REASON_KEY, pb.Reason.Name(error.reason))
    await context.abort(REASONS[error.reason].status, text_of(error), (key,))


def answering(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A unary servicer method whose ThirdrailErrors become statuses, and whose other exceptions are
    logged and become a fixed text."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Context) -> T:
        async with failures_as_status(context):
            return await method(self, request, context)

    return answer


@contextlib.asynccontextmanager
async def failures_as_status(context: Context) -> AsyncIterator[None]:
    """The same around the body of a method that streams its responses."""
    try:
        yield
    except ThirdrailError as error:
        await abort_with(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("a call failed")
        await abort_with(context, Internal(INTERNAL_TEXT))
