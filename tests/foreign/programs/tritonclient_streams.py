# SPDX-License-Identifier: Apache-2.0
"""tritonclient's streams: order, errors in band, cancels, and the asyncio twin."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from foreign.programs.checks import main
from foreign.programs.tritonclient_tensors import executions, inputs, ones, turns

REQUESTS = 100
LONG = 100_000  # turns: a second or more, unless cancelled
ANSWER_S_MAX = 30
ARRIVAL_S = 0.3  # what is sent is with the server by then, and the first of it runs
# grpc pings no more than once a second, and a strict server hangs up at the third ping of an
# otherwise silent client.
PINGING_S = 5

Answers = queue.Queue[tuple[Any, Any]]


@contextmanager
def _stream(url: str, *, keepalive: Any = None, **options: Any) -> Any:
    """A client with an open stream, and the queue of its (result, error) answers."""
    answers: Answers = queue.Queue()
    with triton.InferenceServerClient(url, keepalive_options=keepalive) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), **options)
        yield client, answers


def _value(value: int) -> list[triton.InferInput]:
    return inputs(a=np.full((1, 4), value, np.float32))


def _in_order(url: str, **options: Any) -> None:
    with _stream(url, **options) as (client, answers):
        for value in range(REQUESTS):
            client.async_stream_infer("plus_one", _value(value), request_id=str(value))
        client.stop_stream()  # waits for all that is in flight
        for value in range(REQUESTS):
            result, error = answers.get_nowait()
            assert error is None, error
            assert result.get_response().id == str(value)
            assert result.as_numpy("c")[0, 0] == value + 1


def check_answers_come_in_order(url: str) -> None:
    _in_order(url)


def check_compressed_stream(url: str) -> None:
    _in_order(url, compression_algorithm="gzip", headers={"x-caller": "test"})


def check_many_models_on_one_stream(url: str) -> None:
    words = inputs(x=np.array([b"a", b"\0"], np.object_))
    with _stream(url) as (client, answers):
        client.async_stream_infer("slow", turns(2000), request_id="slow")
        client.async_stream_infer("identity_bytes", words, request_id="words")
        client.async_stream_infer("plus_one", ones(), request_id="ones")
        client.stop_stream()
        found = [answers.get_nowait()[0] for _ in range(3)]
        # Even a quick answer waits for the slow one that was asked for before it.
        assert [each.get_response().id for each in found] == ["slow", "words", "ones"]
        assert found[1].as_numpy("y").tolist() == [b"a", b"\0"]


def check_replies_are_marked_as_final(url: str) -> None:
    with _stream(url) as (client, answers):
        client.async_stream_infer("plus_one", ones(), enable_empty_final_response=True)
        client.stop_stream()
        result, _ = answers.get_nowait()
        assert result.get_response().parameters["triton_final_response"].bool_param
        assert answers.empty()


def check_an_error_does_not_end_the_stream(url: str) -> None:
    with _stream(url) as (client, answers):
        client.async_stream_infer("unheard_of", ones(), request_id="1")
        client.async_stream_infer("plus_one", inputs(a=np.ones((1, 5), np.float32)))
        client.async_stream_infer("plus_one", ones(), request_id="3")
        client.stop_stream()
        messages = [error and error.message() for _, error in (answers.get() for _ in range(3))]
        assert "Request for unknown model: 'unheard_of' is not found" in messages[0]
        assert "unexpected shape for input 'a'" in messages[1]
        assert messages[2] is None


def check_the_first_error_ends_a_stream_that_asks_for_it(url: str) -> None:
    with _stream(url, headers={"triton_grpc_error": "true"}) as (client, answers):
        client.async_stream_infer("unheard_of", ones())
        _, error = answers.get(timeout=ANSWER_S_MAX)
        assert error.status() == "StatusCode.NOT_FOUND", error
        assert "'unheard_of' is not found" in error.message()


def check_cancel_drops_what_is_in_flight(url: str) -> None:
    with _stream(url) as (client, answers):
        client.infer("slow", turns(1))  # when nothing is left of what others began
        before = executions(client, "slow")
        for _ in range(5):
            client.async_stream_infer("slow", turns(LONG))
        time.sleep(ARRIVAL_S)
        client.stop_stream(cancel_requests=True)
        result, error = answers.get(timeout=ANSWER_S_MAX)
        assert result is None
        assert error.status() == "StatusCode.CANCELLED", error
        client.infer("slow", turns(1))
        # The one that ran already cannot be stopped; those that waited for it never ran.
        assert executions(client, "slow") - before == 2


def check_the_stream_timeout(url: str) -> None:
    with _stream(url, stream_timeout=0.3) as (client, answers):
        client.async_stream_infer("slow", turns(LONG))
        _, error = answers.get(timeout=ANSWER_S_MAX)
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED", error


def check_a_client_that_pings_is_not_hung_up_on(url: str) -> None:
    pinging = triton.KeepAliveOptions(keepalive_time_ms=50, http2_max_pings_without_data=0)
    with _stream(url, keepalive=pinging) as (client, answers):
        client.async_stream_infer("plus_one", ones())
        assert answers.get(timeout=ANSWER_S_MAX)[1] is None
        time.sleep(PINGING_S)
        client.async_stream_infer("plus_one", ones())
        assert answers.get(timeout=ANSWER_S_MAX)[1] is None


def check_asyncio_stream(url: str) -> None:
    asyncio.run(_asyncio_stream(url))


async def _asyncio_stream(url: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for value in range(REQUESTS):
            model = "unheard_of" if value == 50 else "plus_one"
            yield {"model_name": model, "inputs": _value(value), "request_id": str(value)}

    async with triton_aio.InferenceServerClient(url) as client:
        value = 0
        async for result, error in client.stream_infer(requests()):
            if value == 50:
                assert "'unheard_of' is not found" in error.message()
            else:
                assert error is None, error
                assert result.get_response().id == str(value)
                assert result.as_numpy("c")[0, 0] == value + 1
            value += 1
        assert value == REQUESTS


def check_asyncio_cancel(url: str) -> None:
    asyncio.run(_asyncio_cancel(url))


async def _asyncio_cancel(url: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "slow", "inputs": turns(LONG)}
        await asyncio.sleep(ANSWER_S_MAX)

    async with triton_aio.InferenceServerClient(url) as client:
        answers = client.stream_infer(requests())
        asyncio.get_running_loop().call_later(0.2, answers.cancel)
        found = 0
        try:
            async for _ in answers:
                found += 1
        except asyncio.CancelledError:
            assert found == 0
        else:
            raise AssertionError("the stream ended as if nothing had happened")


if __name__ == "__main__":
    main(globals())
