# SPDX-License-Identifier: Apache-2.0
"""Makes room for a load within its worker's memory budget: asks for figures, has others leave.

What leaves for what is decided in placement.py. The figures are the worker's own and may change
while others leave, so each eviction is certain or does not happen, and then it is decided anew.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from thirdrail.errors import ResourceExhausted
from thirdrail_server.config import MemoryBudget
from thirdrail_server.control_messages import Fields, WorkerMemory
from thirdrail_server.front.control.placement import Need, NoRoom, Room, decide

TRIES_MAX = 5


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

    @property
    def has_budget(self) -> bool:
        return self._budget.bytes_max > 0

    async def make(self, need: Need) -> int:
        """How much memory the load may take, in bytes; 0: as much as it likes.

        Raises ResourceExhausted, with figures, when there is no room, and what the worker raises.
        """
        if not self.has_budget:
            return 0
        for _ in range(TRIES_MAX):
            room = await self._decide(need)
            if await self._all_evicted(room, need.model):
                if room.unload_first:
                    await self._unload(need.model)
                return room.bytes_max
        raise ResourceExhausted(
            f"worker '{self._worker.name}' has no room for '{need.model}': models that could leave "
            "were in use again when they were to"
        )

    async def _decide(self, need: Need) -> Room:
        memory = WorkerMemory.from_fields(await self._worker.call("memory"))
        residents = [
            replace(each, is_busy=each.is_busy or self._is_held(each.name))
            for each in memory.residents
        ]
        now_ms = time.time_ns() // 1_000_000
        decision = decide(need, residents, memory.leaving_bytes, self._budget, now_ms)
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
