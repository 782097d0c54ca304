# SPDX-License-Identifier: Apache-2.0
"""What follows the death of a worker, and its silence: a real process, which the tests kill."""

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest

from thirdrail.errors import Cancelled, Internal, Unavailable
from thirdrail_server.config import ControlLimits, WorkerConfig
from thirdrail_server.control_channel import ChannelLimits
from thirdrail_server.front.control.supervisor import WorkerDied

EXPLICIT: dict[str, Any] = {"model_control": "explicit"}


async def test_a_dead_worker_comes_back_with_its_models(repository: Any, open_plane: Any) -> None:
    repository.write("a")
    repository.write("b")
    async with open_plane() as plane:
        await plane.until(plane.catalog.all_ready)
        first = (await plane.worker.status()).pid
        counted = {each.name: each.requests_ok for each in await plane.control.counters()}
        await plane.kill_worker()
        assert not plane.catalog.all_ready()
        with pytest.raises(Unavailable, match="worker 'cpu' died; restarting"):
            plane.catalog.find("a")
        assert not psutil.pid_exists(first)
        await plane.until(plane.catalog.all_ready)
        status = await plane.worker.status()
        assert (status.restarts, status.is_serving, status.resident_bytes) == (1, True, 12345)
        assert status.pid != first
        after = {each.name: each.requests_ok for each in await plane.control.counters()}
        assert all(after[name] > counted[name] for name in ("a", "b"))
        assert len(plane.lanes) == 2
        assert plane.lanes[0].closed_because == "worker 'cpu' died: signal 9 (SIGKILL)"


async def test_a_worker_whose_lane_closed_is_replaced(repository: Any, open_plane: Any) -> None:
    repository.write("a")
    async with open_plane() as plane:
        await plane.until(plane.is_settled)
        plane.lanes[0].close("the worker broke the lane's rules")
        await plane.until(lambda: not plane.catalog.is_ready("a", 0))
        await plane.until(lambda: plane.catalog.is_ready("a", 0))
        assert (plane.worker.restarts, len(plane.lanes)) == (1, 2)


async def test_a_model_that_kills_the_worker_is_broken_and_costs_one_restart(
    repository: Any, open_plane: Any
) -> None:
    repository.write("good")
    repository.write("poison", "kill")
    async with open_plane(load_models=("good",), **EXPLICIT) as plane:
        await plane.until(plane.catalog.all_ready)
        text = "worker died while loading it: signal 11"
        with pytest.raises(Internal, match=f"failed to load 'poison', {text}"):
            await plane.control.load("poison")
        assert plane.reason("poison") == f"{text} (SIGSEGV)"
        await plane.until(plane.catalog.all_ready)
        assert plane.worker.restarts == 1
        repository.write("poison")
        assert await plane.control.load("poison") == [1]


async def test_loads_beside_a_poison_model_succeed(repository: Any, open_plane: Any) -> None:
    for name in ("a", "b", "c"):
        repository.write(name, "slow")
    repository.write("poison", "kill")
    worker = WorkerConfig(loads_at_once_max=4)
    async with open_plane(worker=worker) as plane:
        await plane.until(lambda: all(plane.catalog.is_ready(name) for name in ("a", "b", "c")))
        await plane.until(lambda: "worker died while loading it" in plane.reason("poison"))
        await plane.until(lambda: all(plane.catalog.is_ready(name) for name in ("a", "b", "c")))
        assert plane.worker.restarts == 2


async def test_a_reload_that_kills_the_worker_is_not_repeated(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m")
    repository.write("other")
    async with open_plane(load_models=("*",), **EXPLICIT) as plane:
        await plane.until(plane.catalog.all_ready)
        repository.write("m", "kill")
        with pytest.raises(Internal, match="worker died"):
            await plane.control.load("m")
        await plane.until(lambda: plane.catalog.is_ready("other"))
        assert not plane.catalog.is_ready("m")
        assert plane.worker.restarts == 1


async def test_a_worker_that_never_starts_is_tried_again_and_stops_at_once(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m")
    async with open_plane(arguments=("--behave", "exit"), **EXPLICIT) as plane:
        with pytest.raises(Unavailable, match="worker 'cpu' is being restarted"):
            await plane.control.load("m")
        while plane.worker.restarts < 2:
            await asyncio.sleep(0.01)
        assert not (await plane.worker.status()).is_serving


@pytest.mark.slow
async def test_a_model_whose_worker_dies_while_it_is_unloaded_is_unloaded(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m")
    async with open_plane(**EXPLICIT, load_models=("m",)) as plane:
        await plane.until(plane.catalog.all_ready)
        os.kill((await plane.worker.status()).pid, signal.SIGSTOP)
        unload = asyncio.create_task(plane.control.unload("m"))
        await plane.until(lambda: plane.reason("m") == "unloading")
        await plane.kill_worker()
        await unload
        assert plane.reason("m") == "unloaded"


async def test_a_worker_that_says_nothing_is_killed_and_tried_again(
    repository: Any, open_plane: Any
) -> None:
    limits = ControlLimits(worker_start_s_max=1, restart_delay_ms_min=1)
    async with open_plane(arguments=("--behave", "deaf"), control=limits) as plane:
        while plane.worker.restarts < 1:
            await asyncio.sleep(0.01)
        assert not plane.catalog.all_ready()


@pytest.mark.slow
async def test_a_worker_that_falls_silent_is_replaced(repository: Any, open_plane: Any) -> None:
    limits = ControlLimits(worker_silence_s_max=3, restart_delay_ms_min=1)
    repository.write("m")
    async with open_plane(control=limits) as plane:
        await plane.until(plane.catalog.all_ready)
        silent = (await plane.worker.status()).pid
        os.kill(silent, signal.SIGSTOP)
        await plane.until(lambda: plane.worker.restarts == 1)
        await plane.until(plane.catalog.all_ready)
        assert not psutil.pid_exists(silent)
        await asyncio.sleep(4)  # one that answers is left alone
        assert plane.worker.restarts == 1


@pytest.mark.slow
async def test_a_worker_that_falls_silent_is_replaced_however_many_wait_for_it(
    repository: Any, open_plane: Any
) -> None:
    limits = ControlLimits(worker_silence_s_max=1, restart_delay_ms_min=1)
    repository.write("m")
    async with open_plane(control=limits) as plane:
        await plane.until(plane.catalog.all_ready)
        os.kill((await plane.worker.status()).pid, signal.SIGSTOP)
        calls = [plane.worker.call("status") for _ in range(2 * ChannelLimits().control_calls_max)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in ends} <= {WorkerDied, Unavailable}
        await plane.until(plane.catalog.all_ready)


@pytest.mark.slow
async def test_a_worker_that_does_not_end_is_killed_and_that_is_said(
    repository: Any, open_plane: Any, caplog: pytest.LogCaptureFixture
) -> None:
    repository.write("m")
    async with open_plane(control=ControlLimits(worker_stop_s_max=1)) as plane:
        await plane.until(plane.catalog.all_ready)
        silent = (await plane.worker.status()).pid
        os.kill(silent, signal.SIGSTOP)
    assert not psutil.pid_exists(silent)
    assert f"pid {silent} did not end within 1 s: killed" in caplog.text


async def test_a_worker_that_dies_while_the_server_stops_is_not_replaced(
    repository: Any, open_plane: Any
) -> None:
    async with open_plane() as plane:
        await plane.worker.wait_until_up()
        await plane.worker.begin_stop()
        await plane.kill_worker()
        await plane.worker._running
        assert plane.worker.restarts == 0


async def test_loads_that_a_death_cuts_off_end_when_the_server_stops(
    repository: Any, open_plane: Any
) -> None:
    """Of two, neither is known to have killed the worker, and both would wait for the next one."""
    for name in ("a", "b"):
        repository.write(name, "forever")
    async with open_plane(**EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        loads = [asyncio.create_task(plane.control.load(name)) for name in ("a", "b")]
        await plane.until(lambda: all(plane.reason(name) == "loading" for name in ("a", "b")))
        await plane.worker.begin_stop()
        await plane.control.cancel_loads()
        await plane.kill_worker()
        for ended in await asyncio.gather(*loads, return_exceptions=True):
            assert isinstance(ended, Cancelled)
            assert "ended early: the server is stopping" in str(ended)


@pytest.mark.slow
async def test_a_silent_worker_is_not_waited_for_when_the_server_stops(
    repository: Any, open_plane: Any, caplog: pytest.LogCaptureFixture
) -> None:
    limits = ControlLimits(worker_answer_s_max=1, worker_stop_s_max=3600)
    async with open_plane(control=limits) as plane:
        await plane.worker.wait_until_up()
        os.kill((await plane.worker.status()).pid, signal.SIGSTOP)
        asked = asyncio.create_task(plane.worker.call("status"))
        await plane.worker.begin_stop()
        with pytest.raises(WorkerDied):
            await asked
    assert "worker 'cpu' said nothing for 1 s: killed" in caplog.text


async def test_a_lane_that_cannot_be_attached_is_a_death_like_any_other(
    repository: Any, open_plane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.write("m")
    async with open_plane() as plane:
        attach = plane.worker._attach_lane

        async def fail_once(_sock: object) -> None:
            plane.worker._attach_lane = attach
            raise ZeroDivisionError("our own fault")

        plane.worker._attach_lane = fail_once
        await plane.until(plane.catalog.all_ready)
        assert plane.worker.restarts == 1
