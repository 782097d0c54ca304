# SPDX-License-Identifier: Apache-2.0
"""Regions on a device, before a worker that takes its time: it is asked once, and to close again
what it opened for somebody who has gone meanwhile."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from thirdrail.errors import AlreadyExists, InvalidArgument
from thirdrail_server.config import RegionLimits
from thirdrail_server.front.kserve.parameters import RegionRange
from thirdrail_server.front.kserve.regions import RegionRegistry, RequestRegions


class SlowWorker:
    """Answers when it may go on. Opening a number twice is an error, as it is to the real one."""

    name = "cuda:GPU-1"
    restarts = 0

    def __init__(self) -> None:
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.asked: Counter[str] = Counter()
        self.opened: set[int] = set()

    async def call(self, do: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        assert fields is not None
        self.asked[do] += 1
        # Whoever gives up waiting changes nothing about what is done.
        await asyncio.shield(asyncio.ensure_future(self._do(do, fields)))
        return {}

    async def _do(self, do: str, fields: dict[str, Any]) -> None:
        await self.may_go_on.wait()
        if do == "close region":
            self.opened.remove(fields["number"])
            return
        assert fields["number"] not in self.opened
        if fields["size"] > 1000:
            raise InvalidArgument("too large")
        self.opened.add(fields["number"])

    async def until(self, opened: int) -> None:
        while len(self.opened) != opened:
            await asyncio.sleep(0)


def registry_of(worker: SlowWorker) -> RegionRegistry:
    return RegionRegistry(RegionLimits(), is_enabled=True, owners=None, gpus=[worker])


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_was_opened_for_a_caller_who_has_gone_is_closed() -> None:
    worker = SlowWorker()
    registry = registry_of(worker)
    worker.may_go_on.clear()
    registering = asyncio.create_task(registry.register_cuda("R", bytes(64), 0, 8))
    while not worker.asked["open region"]:
        await asyncio.sleep(0)
    with pytest.raises(AlreadyExists):
        await registry.register_cuda("R", bytes(64), 0, 8)
    await cancelled(registering)
    assert registry.count == 0
    worker.may_go_on.set()
    await worker.until(opened=1)
    await worker.until(opened=0)
    await registry.register_cuda("R", bytes(64), 0, 8)  # the name is free


async def test_a_request_that_is_cancelled_leaves_a_region_that_others_can_use() -> None:
    worker = SlowWorker()
    registry = registry_of(worker)
    await registry.register_cuda("R", bytes(64), 0, 8)
    worker.restarts, worker.opened = 1, set()
    worker.may_go_on.clear()
    requests = [RequestRegions(registry) for _ in range(3)]
    for request in requests:
        request.part(RegionRange("R", 0, 8))
    first, *others = [asyncio.create_task(each.open_again()) for each in requests]
    while worker.asked["open region"] < 2:
        await asyncio.sleep(0)
    await cancelled(first)
    worker.may_go_on.set()
    await asyncio.gather(*others)
    assert worker.asked["open region"] == 2
    for request in requests:
        request.end()
    (region,) = registry.all()
    registry.unregister(region)
    await worker.until(opened=0)


async def test_nothing_is_closed_that_could_not_be_opened() -> None:
    worker = SlowWorker()
    registry = registry_of(worker)
    with pytest.raises(InvalidArgument, match="too large"):
        await registry.register_cuda("R", bytes(64), 0, 1001)
    for _ in range(9):  # turns of the loop, in which it could be asked
        await asyncio.sleep(0)
    assert worker.asked == {"open region": 1}
