# SPDX-License-Identifier: Apache-2.0
"""Futures of single calls over gRPC, for threads."""

from concurrent.futures import Future
from typing import Any

import grpc

from thirdrail.failures import error_of_ended_call
from thirdrail.requests import Result, outcome_of_response
from thirdrail.stream import settle
from thirdrail.telling import Teller, ToldFuture


def future_of_call(
    call: Any, address: str, timeout: float | None, teller: Teller
) -> Future[Result]:
    """The result of a call to Infer. Cancelling it cancels the call.

    timeout: that the call has, in seconds. teller: runs the future's callbacks, since `call` tells
    of its end on a thread of gRPC's, which takes in the answers of all calls.
    """
    future = ToldFuture(teller, call.cancel)

    def finish(ended: Any) -> None:
        if ended.code() is grpc.StatusCode.OK:
            settle(future, outcome_of_response(ended.result()))
        else:
            settle(future, error_of_ended_call(ended, address=address, timeout=timeout))

    call.add_done_callback(finish)
    return future
