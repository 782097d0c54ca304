# SPDX-License-Identifier: Apache-2.0
"""Loads that wait: an unload ends those that were asked for before, whatever they wait for; the
death of their worker ends only those of callers who are there to be told."""

import asyncio
from typing import Any

import pytest

from thirdrail.errors import Cancelled, Unavailable
from thirdrail_server.config import CompileConfig, MemoryBudget, WorkerConfig

EXPLICIT: dict[str, Any] = {"model_control": "explicit"}
MEANWHILE = "loading 'm' ended early: the model was unloaded meanwhile"
LONG_S = 20


async def test_a_load_that_waits_for_its_turn(repository: Any, open_plane: Any) -> None:
    repository.write("m", "slow")
    async with open_plane(**EXPLICIT) as plane, asyncio.timeout(LONG_S):
        await plane.worker.wait_until_up()
        begun, waiting = (asyncio.create_task(plane.control.load("m")) for _ in range(2))
        await plane.until(lambda: plane.reason("m") == "loading")
        await plane.control.unload("m")
        assert await begun == [1]  # the worker had it
        with pytest.raises(Cancelled, match=MEANWHILE):
            await waiting
        assert plane.reason("m") == "unloaded"


async def test_a_load_that_waits_for_others(repository: Any, open_plane: Any) -> None:
    for name in ("a", "b"):
        repository.write(name, "forever")
    repository.write("m")
    one_of_each = WorkerConfig(loads_at_once_max=1, compiling=CompileConfig(loads_at_once_max=1))
    settings = {"load_models": ("*",), "worker": one_of_each, **EXPLICIT}
    async with open_plane(**settings) as plane, asyncio.timeout(LONG_S):
        await plane.until(lambda: plane.reason("a") == plane.reason("b") == "loading")
        waiting = asyncio.create_task(plane.control.load("m"))
        await asyncio.sleep(0)
        await plane.control.unload("m")
        with pytest.raises(Cancelled, match=MEANWHILE):
            await waiting
        assert plane.reason("m") == "unloaded"


async def test_a_load_that_waits_for_a_worker(repository: Any, open_plane: Any) -> None:
    repository.write("m")
    settings = {"load_models": ("m",), "arguments": ("--behave", "exit"), **EXPLICIT}
    async with open_plane(**settings) as plane, asyncio.timeout(LONG_S):
        assert plane.reason("m") == "waiting to be loaded"
        await plane.control.unload("m")
        assert plane.reason("m") == "unloaded"


async def test_a_model_does_not_come_back_that_was_unloaded_while_its_worker_was_down(
    repository: Any, open_plane: Any
) -> None:
    for name in ("m", "other"):
        repository.write(name)
    async with open_plane(load_models=("*",), **EXPLICIT) as plane, asyncio.timeout(LONG_S):
        await plane.until(plane.catalog.all_ready)
        await plane.kill_worker()
        await plane.control.unload("m")
        await plane.until(lambda: plane.catalog.is_ready("other"))
        await plane.control.load("other")  # behind whatever was ordered before
        assert plane.reason("m") == "unloaded"


@pytest.mark.slow
async def test_a_load_that_waits_for_room_survives_its_worker(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m")
    settings = {"load_models": ("m",), "memory": MemoryBudget(bytes_max=1000), **EXPLICIT}
    async with open_plane(**settings) as plane, asyncio.timeout(LONG_S):
        (models,) = plane.control.workers
        async with models._room._deciding:
            await plane.until(lambda: plane.reason("m") == "loading")
            await plane.kill_worker()
        await plane.until(plane.catalog.all_ready)


@pytest.mark.slow
async def test_what_serves_comes_back_beside_a_load_that_waited_for_room(
    repository: Any, open_plane: Any
) -> None:
    repository.write("m")
    settings = {"load_models": ("m",), "memory": MemoryBudget(bytes_max=1000), **EXPLICIT}
    async with open_plane(**settings) as plane, asyncio.timeout(LONG_S):
        await plane.until(plane.catalog.all_ready)
        (models,) = plane.control.workers
        async with models._room._deciding:
            load = asyncio.create_task(plane.control.load("m"))
            await plane.until(lambda: plane.catalog.get("m").load_phase)
            await plane.kill_worker()
        with pytest.raises(Unavailable, match="is not running"):
            await load
        await plane.until(plane.catalog.all_ready)
