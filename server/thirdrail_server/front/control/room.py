# SPDX-License-Identifier: Apache-2.0
"""Makes room for a load within its worker's memory budget: asks for figures, has others leave.

What leaves for what is decided in placement.py. The figures are the worker's own and may change
while others leave, so each eviction is certain or does not happen, and then it is decided anew.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from thirdrail.errors import ResourceExhausted
from thirdrail_server.config import MemoryBudget, SwapOverBudget
from thirdrail_server.control_messages import Fields, WorkerMemory
from thirdrail_server.front.control.placement import Need, NoRoom, Room, decide

TRIES_MAX = 5
MS = 1_000_000  # nanoseconds


class Worker(Protocol):
    name: str

    async def call(self, do: str) -> Fields: ...


class RoomMaker:
    """For one worker.

    is_held: whether a load or unload of a model is under way or waits.
    evict: takes the first model out of memory for the second; False: it is not idle any more.
    unload: takes a model out of memory that is about to be loaded anew.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        worker: Worker,
        *,
        is_held: Callable[[str], bool],
        evict: Callable[[str, str], Awaitable[bool]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:
        self._budget = budget
        self._worker = worker
        self._is_held = is_held
        self._evict = evict
        self._unload = unload
        self._reserved: dict[str, int] = {}  # for loads under way: model -> bytes
        self._deciding = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def made(self, need: Need, *, may_interrupt: bool) -> AsyncIterator[None]:
        """Room for a load, which is kept free until the load is over.

        may_interrupt: whether `swap` unload-first holds for it.
        Raises ResourceExhausted, with figures, when there is no room, and what the worker raises.
        """
        if not self._budget.bytes_max:
            yield
            return
        budget = self._budget
        if not may_interrupt:
            budget = replace(budget, swap=SwapOverBudget.REFUSE)
        async with self._deciding:
            await self._make(need, budget)
            self._reserved[need.model] = need.size
        try:
            yield
        finally:
            del self._reserved[need.model]

    async def _make(self, need: Need, budget: MemoryBudget) -> None:
        for _ in range(TRIES_MAX):
            room = await self._decide(need, budget)
            if await self._all_evicted(room, need.model):
                if room.unload_first:
                    await self._unload(need.model)
                return
        raise ResourceExhausted(
            f"worker '{self._worker.name}' has no room for '{need.model}': models that could leave "
            "were in use again when they were to"
        )

    async def _decide(self, need: Need, budget: MemoryBudget) -> Room:
        memory = WorkerMemory.from_fields(await self._worker.call("memory"))
        residents = [
            replace(each, is_busy=each.is_busy or self._is_held(each.name))
            for each in memory.residents
        ]
        taken = memory.leaving_bytes + memory.shared_bytes + sum(self._reserved.values())
        decision = decide(need, residents, taken, budget, time.time_ns() // MS)
        if isinstance(decision, NoRoom):
            raise ResourceExhausted(
                f"worker '{self._worker.name}' has no room for '{need.model}': {decision.text}"
            )
        return decision

    async def _all_evicted(self, room: Room, model: str) -> bool:
        for victim in room.evict:
            if not await self._evict(victim, model):
                return False
        return True
