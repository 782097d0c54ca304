# SPDX-License-Identifier: Apache-2.0
"""The one thread that gives sessions' memory back."""

import asyncio

import pytest

from thirdrail_server.worker.janitor import Janitor

WAIT_S_MAX = 20


class Broken:
    def close(self) -> None:
        raise RuntimeError("broken")


async def test_memory_that_cannot_be_given_back_does_not_stop_the_janitor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    janitor, ended = Janitor(), asyncio.Semaphore(0)
    async with asyncio.timeout(WAIT_S_MAX):
        for _ in range(2):
            janitor.unmap([Broken()], ended.release)
            await ended.acquire()
    assert "memory of a session cannot be given back" in caplog.text
