# SPDX-License-Identifier: Apache-2.0
"""An event loop that looks for news for a moment before it sleeps. See thirdrail.lane.busy_poll."""

import asyncio
import os
import selectors
import time
from typing import Any

from thirdrail.lane.busy_poll import BusyWindow

Ready = list[tuple[selectors.SelectorKey, int]]


def new_loop(busy_poll_us: int) -> asyncio.AbstractEventLoop:
    """busy_poll_us: how long it looks at most; 0 for asyncio's usual loop."""
    if not busy_poll_us:
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(BusySelector(BusyWindow(busy_poll_us)))


class BusySelector(selectors.EpollSelector):
    """Raises OSError as EpollSelector does."""

    def __init__(self, window: BusyWindow) -> None:
        super().__init__()
        self._window = window

    def select(self, timeout: float | None = None) -> Ready:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        started_ns = time.perf_counter_ns()
        ready = self._look(started_ns) if self._window.ns else []
        if not ready:
            ready = super().select(timeout)
        self._window.waited(time.perf_counter_ns() - started_ns)
        return ready

    def _look(self, started_ns: int) -> Ready:
        until_ns = started_ns + self._window.ns
        poll: Any = super().select
        while not (ready := poll(0)):
            if time.perf_counter_ns() >= until_ns:
                return []
            os.sched_yield()  # whoever has work to do on this core goes first
        return list(ready)
