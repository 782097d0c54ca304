# SPDX-License-Identifier: Apache-2.0
"""Who may load now: one load or unload per model at a time, and few loads in all."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from thirdrail.errors import ResourceExhausted


@dataclass(slots=True)
class _Line:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0  # with the one whose turn it is


class Turns:
    """First come, first served, per name."""

    def __init__(self, waiting_max: int) -> None:
        self._waiting_max = waiting_max
        self._lines: dict[str, _Line] = {}

    def is_taken(self, name: str) -> bool:
        """Whether somebody has a turn or waits for one. If not, `of` does not wait."""
        return name in self._lines

    @contextlib.asynccontextmanager
    async def of(self, name: str, *, is_callers: bool = True) -> AsyncIterator[None]:
        """Wait for a turn and have it. Raises ResourceExhausted when the line is too long.

        is_callers: somebody asked for it; what the server owes itself has its place in any line.
        """
        line = self._lines.setdefault(name, _Line())
        if is_callers and line.length > self._waiting_max:
            raise ResourceExhausted(
                f"{self._waiting_max} loads and unloads of '{name}' are waiting, the most allowed"
            )
        line.length += 1
        try:
            async with line.lock:
                yield
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[name]


class LoadGate:
    """Lets in `loads_max` at once, or one alone."""

    def __init__(self, loads_max: int) -> None:
        self._loads_max = loads_max
        self._permits = asyncio.Semaphore(loads_max)
        self._one_alone = asyncio.Lock()  # two that collect all permits would wait for each other

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[Callable[[], None]]:
        """Yields what lets another one in, for who only waits from now on."""
        await self._permits.acquire()
        with contextlib.ExitStack() as permit:
            permit.callback(self._permits.release)
            yield permit.close  # once, however often it is called

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[Callable[[], None]]:
        """Yields what lets nobody in."""
        async with self._one_alone, contextlib.AsyncExitStack() as permits:
            for _ in range(self._loads_max):
                await permits.enter_async_context(self._permits)
            yield lambda: None
