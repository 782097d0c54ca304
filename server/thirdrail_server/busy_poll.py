# SPDX-License-Identifier: Apache-2.0
"""An event loop that looks for news for a moment before it sleeps. See thirdrail.lane.busy_poll."""

import asyncio
import selectors
import time
from collections.abc import Sequence

from thirdrail.lane.busy_poll import BusyWindow

Ready = tuple[selectors.SelectorKey, int]


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

    def select(self, timeout: float | None = None) -> list[Ready]:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        started_ns = time.perf_counter_ns()
        ready: Sequence[Ready] = ()
        if self._window.ns:
            ready = self._window.look(super().select, started_ns)
        if not ready:
            ready = super().select(timeout)
        now_ns = time.perf_counter_ns()
        self._window.waited(now_ns - started_ns, now_ns)
        return list(ready)
