# SPDX-License-Identifier: Apache-2.0
"""Starting a real process, noticing its death, ending it, leaving nothing behind."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from support.open_files import open_files, opened_since
from thirdrail_server.control_channel import ChannelLimits, open_channel
from thirdrail_server.front.control.worker_process import exit_text, start_worker

WORKER = (sys.executable, str(Path(__file__).with_name("worker_child.py")))


async def test_a_worker_ends_when_its_channel_is_closed() -> None:
    before = open_files()
    worker = start_worker((), WORKER)
    channel = await open_channel(worker.control, ChannelLimits())
    assert set(await channel.call("status")) == {"status"}
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)
    await channel.close()
    assert await worker.stop(grace_s=30) == "exit status 0"
    worker.lane.close()
    assert not psutil.pid_exists(worker.pid)
    assert opened_since(before) == []


async def test_a_killed_worker_is_noticed_and_reaped() -> None:
    worker = start_worker((), WORKER)
    os.kill(worker.pid, signal.SIGSEGV)
    assert await worker.wait() == "signal 11 (SIGSEGV)"
    assert await worker.wait() == "signal 11 (SIGSEGV)"
    assert not worker.is_alive
    assert not psutil.pid_exists(worker.pid)
    worker.kill()  # of no effect: the pid may be somebody else's by now
    worker.control.close()
    worker.lane.close()


async def test_a_worker_that_does_not_end_is_killed() -> None:
    worker = start_worker(("--behave", "deaf"), WORKER)
    worker.control.close()
    worker.lane.close()
    assert await worker.stop(grace_s=0.05) == "signal 9 (SIGKILL)"
    assert not psutil.pid_exists(worker.pid)


async def test_one_who_gives_up_waiting_does_not_end_it_for_the_others() -> None:
    worker = start_worker((), WORKER)
    impatient = asyncio.create_task(worker.wait())
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    worker.kill()
    assert await worker.wait() == "signal 9 (SIGKILL)"
    worker.control.close()
    worker.lane.close()


async def test_a_command_that_does_not_exist_leaves_nothing_open() -> None:
    before = open_files()
    with pytest.raises(OSError, match="No such file"):
        start_worker((), ("/no/such/program",))
    assert opened_since(before) == []


def test_how_a_process_ended_in_words() -> None:
    assert exit_text(3) == "exit status 3"
    assert exit_text(-9) == "signal 9 (SIGKILL)"
    assert exit_text(-40) == "signal 40"
