# SPDX-License-Identifier: Apache-2.0
"""Waiting for input memory on an event loop: until there is room, or until the worker gives more.

What there is, and whether waiting can help, `session_memory` knows.
"""

import asyncio
from collections.abc import Callable, Sequence

from thirdrail.errors import ResourceExhausted, ThirdrailError
from thirdrail.lane.places import Place
from thirdrail.lane.session_memory import SessionMemory


class Room:
    """The input memory of one session, for whoever needs a piece of it.

    request_growth: sends a GrowRequest for so many bytes, alone or not; the answer arrives by
        `grown` or `refused`.
    collect: gives back what arrays showed that are gone; whether there was any.
    give_back: for a place that nobody took.
    """

    def __init__(
        self,
        memory: SessionMemory,
        request_growth: Callable[[int, bool], None],
        collect: Callable[[], bool],
        give_back: Callable[[Sequence[Place]], None],
    ) -> None:
        self._memory = memory
        self._request_growth = request_growth
        self._collect = collect
        self._give_back = give_back
        self._growing: asyncio.Future[Place | None] | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._ended: ThirdrailError | None = None

    async def reserve(self, sizes: Sequence[int]) -> list[Place]:
        """Pieces for one call, all at once. Raises ResourceExhausted, or why the session ended."""
        while True:
            self._require_open()
            places = self._memory.reserve(sizes)
            if places is not None:
                return places
            if self._collect():
                continue
            size = self._memory.growth_for(sizes)
            if size is None:
                freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(freed)
                await freed
            elif self._growing is None:
                await self.grow(size)
            else:
                await asyncio.shield(self._growing)  # for another call; it may do for us as well

    async def grow(self, size: int, *, alone: bool = False) -> Place | None:
        """More memory of the worker; `alone`: a place of its own. One request at a time."""
        while self._growing is not None:
            await asyncio.wait([self._growing])
        self._require_open()
        growing = self._growing = asyncio.get_running_loop().create_future()
        self._request_growth(size, alone)
        try:
            return await asyncio.shield(growing)
        except asyncio.CancelledError:
            growing.add_done_callback(self._give_back_unused)
            raise

    def grown(self, place: Place | None) -> None:
        """A chunk of input memory has come; `place`: it was asked for alone."""
        growing, self._growing = self._growing, None
        if growing is not None:
            growing.set_result(place)
        elif place is not None:
            self._give_back([place])

    def refused(self, message: str) -> None:
        """The worker has no more memory for us."""
        growing, self._growing = self._growing, None
        if growing is not None:
            _fail(growing, ResourceExhausted(message))

    def wake(self) -> None:
        """Some memory is free again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def close(self, error: ThirdrailError) -> None:
        """The session has ended: whoever waits, fails."""
        self._ended = error
        growing, self._growing = self._growing, None
        if growing is not None:
            _fail(growing, error)
        self.wake()

    def _require_open(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _give_back_unused(self, growing: "asyncio.Future[Place | None]") -> None:
        if growing.exception() is None and (place := growing.result()) is not None:
            self._give_back([place])


def _fail(future: "asyncio.Future[Place | None]", error: ThirdrailError) -> None:
    future.set_exception(error)
    future.exception()  # retrieved here: nobody may be waiting any more
