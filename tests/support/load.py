# SPDX-License-Identifier: Apache-2.0
"""Client processes that call all the time while the server's processes are killed."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np

from thirdrail import Client, Result, errors
from thirdrail.aio import AsyncClient
from thirdrail.tensors import Array

CALL_S_MAX = 30.0  # one that takes longer hangs
SIZES = (16, 1 << 16)  # inline, and by reference
IN_FLIGHT = 8
AFTER_FAILURE_S = 0.01


@dataclass(slots=True)
class Report:
    """How calls ended: with what was sent, with a clear error, or otherwise, which is a failure."""

    results: int = 0
    unavailable: int = 0
    others: list[str] = field(default_factory=list)
    transport: str = ""


class Asked:
    """What the test wants to know: `report` now, or `stop`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.report = Report()

    def answer(self, transport: str) -> bool:
        """Whether to go on."""
        if not self._pipe.poll():
            return True
        question = self._pipe.recv()
        self.report.transport = transport
        self._pipe.send(self.report)
        self.report = Report()
        return bool(question != "stop")

    def check(self, sent: Array, result: Result) -> None:
        if np.array_equal(result["y"], sent):
            self.report.results += 1
        else:
            self.report.others.append(f"sent {sent[:2]}, got {result['y'][:2]}")

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        try:
            yield
        except errors.Unavailable as error:
            self.report.unavailable += 1
            if not str(error):
                self.report.others.append("an error without a word")
        except Exception as error:
            self.report.others.append(repr(error))


def tensor(call: int) -> Array:
    return np.full(SIZES[call % len(SIZES)], call, np.float32)


def call_one_by_one(pipe: Connection, url: str) -> None:
    asked, call = Asked(pipe), 0
    with Client(url) as client:
        while asked.answer(client.transport.name):
            call += 1
            with asked.counting():
                sent = tensor(call)
                asked.check(sent, client.infer("identity", sent, timeout=CALL_S_MAX))


def call_borrowing(pipe: Connection, url: str) -> None:
    """In place, both ways, and results as inputs."""
    asked, call = Asked(pipe), 0
    with Client(url) as client:
        while asked.answer(client.transport.name):
            call += 1
            with asked.counting():
                sent = client.empty(1 << 16)
                sent[:] = call
                first = client.infer("identity", sent, borrow=True, timeout=CALL_S_MAX)
                with client.infer("identity", first["y"], borrow=True, timeout=CALL_S_MAX) as last:
                    asked.check(sent, last)


def call_with_futures(pipe: Connection, url: str) -> None:
    asked, call = Asked(pipe), 0
    with Client(url) as client:
        while asked.answer(client.transport.name):
            sent = [tensor(call + number) for number in range(IN_FLIGHT)]
            call += IN_FLIGHT
            futures = []
            for each in sent:
                with asked.counting():
                    futures.append((each, client.submit("identity", each)))
            for each, future in futures:
                with asked.counting():
                    asked.check(each, future.result(CALL_S_MAX))


def call_asyncio(pipe: Connection, url: str) -> None:
    asyncio.run(_call_asyncio(Asked(pipe), url))


async def _call_asyncio(asked: Asked, url: str) -> None:
    async def one(client: AsyncClient, call: int) -> None:
        with asked.counting():
            sent = tensor(call)
            result = await client.infer("identity", sent, timeout=CALL_S_MAX)
            asked.check(sent, result)

    call = 0
    async with AsyncClient(url) as client:
        while asked.answer(client.transport.name):
            await asyncio.gather(*(one(client, call + number) for number in range(IN_FLIGHT)))
            call += IN_FLIGHT


LOADS = (call_one_by_one, call_borrowing, call_with_futures, call_asyncio)
