# SPDX-License-Identifier: Apache-2.0
"""Making room on a worker whose models are as large as their files: races, and what stays true."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from thirdrail.errors import NotFound, ResourceExhausted
from thirdrail_server.config import MemoryBudget, OverBudget

EXPLICIT: dict[str, Any] = {"model_control": "explicit"}
EVICTING: dict[str, Any] = {
    "memory": MemoryBudget(100, over_budget=OverBudget.EVICT, spared_s=0),
    **EXPLICIT,
}


def of_size(size: int, words: str = "ok") -> str:
    """A model file of so many bytes."""
    return f"{words} ".ljust(size, "x")


@asynccontextmanager
async def evicting_beside(
    repository: Any, open_plane: Any, first: tuple[str, int], second: tuple[str, int]
) -> AsyncIterator[Any]:
    """Two models by name and size, of which the first is loaded."""
    for name, size in (first, second):
        repository.write(name, of_size(size))
    async with open_plane(load_models=(first[0],), **EVICTING) as plane:
        await plane.until(plane.catalog.all_ready)
        yield plane


async def test_loads_under_way_keep_their_room(repository: Any, open_plane: Any) -> None:
    for name in "abc":
        repository.write(name, of_size(45, "slow"))
    async with open_plane(memory=MemoryBudget(100), **EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        loads = [plane.control.load(name) for name in "abc"]
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
    assert outcomes.count([1]) == 2
    assert [type(each) for each in outcomes].count(ResourceExhausted) == 1


async def test_a_load_that_failed_gives_its_room_back(repository: Any, open_plane: Any) -> None:
    repository.write("bad", of_size(90, "bad"))
    repository.write("good", of_size(90))
    async with open_plane(memory=MemoryBudget(100), **EXPLICIT) as plane:
        await plane.worker.wait_until_up()
        with pytest.raises(Exception, match="damaged"):
            await plane.control.load("bad")
        assert await plane.control.load("good") == [1]


async def test_a_model_that_is_used_again_is_left_alone_and_it_is_decided_anew(
    repository: Any, open_plane: Any
) -> None:
    async with evicting_beside(repository, open_plane, ("used_once", 60), ("m", 60)) as plane:
        await plane.control.load("m")
        assert plane.reason("used_once").startswith("evicted to make room for 'm'")
        assert plane.control.workers[0].evictions == 1


async def test_a_load_does_not_wait_for_ever_for_models_in_use(
    repository: Any, open_plane: Any
) -> None:
    async with evicting_beside(repository, open_plane, ("used_always", 60), ("m", 60)) as plane:
        with pytest.raises(ResourceExhausted, match="were in use again when they were to"):
            await plane.control.load("m")
        assert plane.catalog.is_ready("used_always")
        assert plane.control.workers[0].evictions == 0


async def test_no_model_leaves_whose_own_load_is_under_way(
    repository: Any, open_plane: Any
) -> None:
    async with evicting_beside(repository, open_plane, ("a", 40), ("b", 80)) as plane:
        repository.write("a", of_size(40, "held"))
        reload = asyncio.create_task(plane.control.load("a"))
        await plane.until(lambda: plane.catalog.get("a").load_phase)
        with pytest.raises(ResourceExhausted, match=r"'a' 0\.0 MiB \(busy\)"):
            await plane.control.load("b")
        (repository.path / "a" / "1" / "go").touch()
        assert await reload == [1]


async def test_what_was_evicted_does_not_come_back_with_a_new_worker(
    repository: Any, open_plane: Any
) -> None:
    async with evicting_beside(repository, open_plane, ("a", 60), ("b", 60)) as plane:
        await plane.control.load("b")
        assert plane.catalog.all_ready(), "an evicted model is missed by nobody"
        await plane.kill_worker()
        await plane.until(lambda: plane.catalog.is_ready("b"))
        with pytest.raises(NotFound, match="evicted to make room for 'b'"):
            plane.catalog.find("a")
        assert await plane.control.load("a") == [1]
        assert not plane.catalog.is_ready("b")
