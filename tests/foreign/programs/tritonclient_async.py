# SPDX-License-Identifier: Apache-2.0
"""tritonclient with many calls at once: callbacks and cancels on threads, and its asyncio twin."""

import asyncio
import queue
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import assert_refused, executions, inputs, ones, turns

CALLS = 50
LONG = 100_000  # turns: a second or more, unless cancelled
ANSWER_S_MAX = 30
QUEUE_FULL = "Exceeds maximum queue size"


def _rows(value: int) -> list[triton.InferInput]:
    full = np.full((1, 4), value, np.float32)
    return inputs(a=full, b=full)


def check_callbacks(url: str) -> None:
    answers: queue.Queue[tuple[str, float]] = queue.Queue()

    def answered(result: Any, error: Any) -> None:
        assert error is None, error
        answers.put((result.get_response().id, result.as_numpy("c")[0, 0]))

    with triton.InferenceServerClient(url) as client:
        for value in range(CALLS):
            client.async_infer("add", _rows(value), answered, request_id=str(value))
        received = dict(answers.get(timeout=ANSWER_S_MAX) for _ in range(CALLS))
    assert received == {str(value): 2.0 * value for value in range(CALLS)}


def check_a_callback_gets_the_error(url: str) -> None:
    errors: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.async_infer("unheard_of", ones(), lambda result, error: errors.put(error))
        error = errors.get(timeout=ANSWER_S_MAX)
    assert error.status() == "StatusCode.NOT_FOUND", error
    assert "'unheard_of' is not found" in error.message()


def check_a_cancelled_call_leaves_the_queue(url: str) -> None:
    ended: queue.Queue[Any] = queue.Queue()
    cancelled: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        before = executions(client, "narrow")
        client.async_infer("narrow", turns(LONG), lambda result, error: ended.put(error))
        waiting = client.async_infer(
            "narrow", turns(LONG), lambda result, error: cancelled.put(error)
        )
        # Refused since the queue of one is taken: the call that is to be cancelled waits there.
        assert_refused(lambda: client.infer("narrow", turns(1)), "UNAVAILABLE", QUEUE_FULL)
        waiting.cancel()
        assert cancelled.get(timeout=ANSWER_S_MAX).status() == "StatusCode.CANCELLED"
        assert ended.get(timeout=ANSWER_S_MAX) is None
        client.infer("narrow", turns(1))
        assert executions(client, "narrow") - before == 2


def check_a_full_queue_refuses(url: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        for _ in range(6):
            client.async_infer("narrow", turns(3000), lambda result, error: answers.put(error))
        errors = [answers.get(timeout=ANSWER_S_MAX) for _ in range(6)]
    refused = [error for error in errors if error is not None]
    assert refused
    assert len(refused) < 6
    for error in refused:
        assert error.status() == "StatusCode.UNAVAILABLE", error
        assert QUEUE_FULL in error.message(), error


def check_asyncio_calls(url: str) -> None:
    asyncio.run(_asyncio_calls(url))


async def _asyncio_calls(url: str) -> None:
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("add")).name == "add"
        results = await asyncio.gather(
            *(client.infer("add", _rows(value), request_id=str(value)) for value in range(CALLS))
        )
        for value, result in enumerate(results):
            assert result.as_numpy("c").tolist() == [[2 * value] * 4]
            assert result.get_response().id == str(value)


def check_asyncio_refusal(url: str) -> None:
    assert_refused(lambda: asyncio.run(_asyncio_unknown(url)), "NOT_FOUND", "'unheard_of'")


async def _asyncio_unknown(url: str) -> None:
    async with triton_aio.InferenceServerClient(url) as client:
        await client.infer("unheard_of", ones())


if __name__ == "__main__":
    main(globals())
