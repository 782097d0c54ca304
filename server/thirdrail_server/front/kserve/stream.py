# SPDX-License-Identifier: Apache-2.0
"""One stream's requests, answered concurrently and in their order.

Reading goes on while answers are awaited, up to a bound on requests that are read and whose replies
are not written yet. At the bound nothing more is read, so HTTP/2 flow control holds the sender, and
a peer that does not take its replies keeps no more than that many of them here.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from typing import Any, TypeVar

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class StreamCut(Exception):
    """The server stopped reading the stream before its end. What had been read is answered."""


async def replies_in_order(
    requests: AsyncIterable[_Request],
    answer: Callable[[_Request], Coroutine[Any, Any, _Reply]],
    *,
    in_flight_max: int,
    stop: asyncio.Event,
) -> AsyncGenerator[_Reply, None]:
    """Yields the answers in order until the requests end, or until `stop` is set.

    A reply counts as written when the next one is asked for. Raises what an answer raises; what
    `requests` or `answer` itself raises, and StreamCut after a stop, once everything read before is
    answered. However it is left, every answer still under way is cancelled and has ended.
    """
    slots = asyncio.Semaphore(in_flight_max)
    answers: asyncio.Queue[asyncio.Task[_Reply] | None] = asyncio.Queue()
    unfinished: set[asyncio.Task[_Reply]] = set()

    async def read() -> None:
        try:
            await slots.acquire()
            async for request in requests:
                task = asyncio.create_task(answer(request))
                unfinished.add(task)
                answers.put_nowait(task)
                await slots.acquire()
        finally:
            answers.put_nowait(None)

    reader = asyncio.create_task(read())
    stopper = asyncio.create_task(_cancel_on(stop, reader))
    try:
        while (task := await answers.get()) is not None:
            reply = await task
            unfinished.discard(task)
            yield reply
            slots.release()
        await asyncio.wait((reader,))
        if reader.cancelled():
            raise StreamCut
        reader.result()
    finally:
        await _end(stopper, reader, *unfinished)


async def _cancel_on(stop: asyncio.Event, reader: asyncio.Task[None]) -> None:
    await stop.wait()
    reader.cancel()


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    # Nobody wants their outcome any more, but none may outlive the stream.
    await asyncio.gather(*tasks, return_exceptions=True)
