# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still for a while (SIGSTOP): whoever waits for them is told, and all goes on
afterwards.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from support.dying import call_and_call
from support.holdings import Watch
from support.killable import killable, until
from support.neighbours import Neighbour
from support.server import RunningServer, running_server
from thirdrail import Client, Result, errors
from thirdrail.aio import AsyncClient

SMALL = np.arange(16, dtype=np.float32)
LARGE = np.arange(1 << 18, dtype=np.float32)
HUGE = np.arange(1 << 22, dtype=np.float32)  # more than the session has memory for at first
TIMEOUT_S = 0.2
CALLS_MAX = 5000


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_client_that_stands_still(
    server: RunningServer, watch: Watch, neighbour: Neighbour
) -> None:
    with killable(call_and_call, server.url) as child:
        child.hear()
        with stopped(child.pid):
            time.sleep(0.1)
            calls = watch.of_pid(child.pid).calls
            neighbour.has_gone_on()
            assert watch.of_pid(child.pid).calls <= calls + 1
        until(lambda: watch.of_pid(child.pid).calls > calls + 10)
        os.kill(child.pid, signal.SIGSTOP)
        child.kill()
        watch.until_back()


@pytest.fixture(scope="module")
def mortal(
    abused_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Not the one that a neighbour calls."""
    with running_server(abused_repository, tmp_path_factory.mktemp("stopped")) as running:
        yield running


def test_a_worker_that_stands_still(mortal: RunningServer) -> None:
    """Calls end at their timeouts, those that wait for memory as well; their results are thrown
    away when they come."""
    with Client(mortal.url, transport="lane") as client:
        client.infer("identity", LARGE)
        watch = Watch(mortal)
        with stopped(mortal.worker_pid()):
            for tensor in (SMALL, LARGE, HUGE, SMALL):
                with pytest.raises(errors.TimedOut):
                    client.infer("identity", tensor, timeout=TIMEOUT_S)
            future = client.submit("identity", SMALL)
            with pytest.raises(TimeoutError):
                future.result(TIMEOUT_S)
        assert np.array_equal(future.result(30)["y"], SMALL)
        for tensor in (SMALL, LARGE, HUGE):
            assert np.array_equal(client.infer("identity", tensor)["y"], tensor)
        assert client.transport.name == "lane"
        until(lambda: watch.holdings().leases == 0)
        watch.close()


def test_who_only_waits_to_be_told_hears_of_timeouts(mortal: RunningServer) -> None:
    """Nobody asks for the results; the later call has the earlier end."""
    with Client(mortal.url, transport="lane") as client:
        client.infer("identity", SMALL)
        with stopped(mortal.worker_pid()):
            late = client.submit("identity", SMALL, timeout=5 * TIMEOUT_S)
            soon = client.submit("identity", SMALL, timeout=TIMEOUT_S)
            ends: SimpleQueue[Future[Result]] = SimpleQueue()
            for future in (late, soon):
                future.add_done_callback(ends.put)
            assert [ends.get(timeout=30), ends.get(timeout=30)] == [soon, late]
            for future in (late, soon):
                with pytest.raises(errors.TimedOut):
                    future.result()
        assert np.array_equal(client.infer("identity", SMALL)["y"], SMALL)


async def test_a_worker_that_stands_still_under_asyncio(mortal: RunningServer) -> None:
    async with AsyncClient(mortal.url, transport="lane") as client:
        await client.infer("identity", LARGE)
        with stopped(mortal.worker_pid()):
            for tensor in (SMALL, LARGE, HUGE, SMALL):
                with pytest.raises(errors.TimedOut):
                    await client.infer("identity", tensor, timeout=TIMEOUT_S)
        for tensor in (SMALL, LARGE, HUGE):
            assert np.array_equal((await client.infer("identity", tensor))["y"], tensor)
        assert client.transport.name == "lane"


def test_more_than_a_stopped_worker_can_be_sent(mortal: RunningServer) -> None:
    """The kernel's queue is full: a call is not sent, and ends at its timeout all the same."""
    with Client(mortal.url, transport="lane") as client:
        client.infer("identity", SMALL)
        sent: list[Future[Result]] = []

        def send_on() -> None:
            while len(sent) < CALLS_MAX:
                sent.append(client.submit("identity", SMALL, timeout=TIMEOUT_S))

        with stopped(mortal.worker_pid()), pytest.raises(errors.TimedOut):
            send_on()
        assert len(sent) > 50
        for future in sent:
            with contextlib.suppress(errors.TimedOut):
                assert np.array_equal(future.result(30)["y"], SMALL)
        assert np.array_equal(client.infer("identity", SMALL)["y"], SMALL)
