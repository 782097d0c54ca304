# SPDX-License-Identifier: Apache-2.0
"""How long to look for news before sleeping.

A core that sleeps takes tens of microseconds to wake, more on a virtual machine: half of a small
call on the lane, in which two processes wait for each other in turns. Who looks for a moment before
it sleeps is there when the answer comes. Looking in vain is wasted, so it adapts as Linux's guest
halt polling does (Documentation/virt/guest-halt-polling): the window doubles while news would have
come within the longest one, halves while it would not, and so closes where calls are rare or slow.
Where others take this core for long it closes at once and for a while: the core is awake anyway,
and they need it. Each time that this happens again soon it closes for twice as long, for it costs
3 ms: since Linux 6.18 who yields gives up his turn, also to a process of the lowest priority that
would never have got the core otherwise.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

# It has to cover a whole call of the other side, and its moods: a call through an instance thread
# takes 140 us if all look and 220 if all sleep, one over gRPC 250 to 400. That is twice as long as
# KVM's host side looks (halt_poll_ns); calls take 6 to 9 % more CPU for it than with once as long.
# With four times a caller who calls every millisecond has the worker look in vain.
LONGEST_US = 400
SHORTEST_NS = 10_000
# Who gets the core back after this long has met a process that computes. Shorter absences are the
# kernel's, or threads of the same call.
CROWDED_NS = 1_000_000
# So long it then stays closed: with calls of 100 us, 1 of 500 meets a crowd, and 1 of 2000 later.
# Not longer, or it would be closed long after the crowd is gone.
CLOSED_NS_MIN = 50_000_000
CLOSED_NS_MAX = 200_000_000

T = TypeVar("T")


class BusyWindow:
    """For one waiter. longest_us: 0 never looks; nor does a process that has one core only."""

    __slots__ = ("_closed_ns", "_closed_until_ns", "_longest_ns", "ns")

    def __init__(self, longest_us: int = LONGEST_US) -> None:
        if longest_us < 0:
            raise ValueError(f"a busy poll takes 0 us or more, got {longest_us}")
        self._longest_ns = longest_us * 1000 if _cores() > 1 else 0
        self.ns = 0  # how long to look next time
        self._closed_ns = self._closed_until_ns = 0

    def look(self, find: Callable[[int], Sequence[T]], now_ns: int) -> Sequence[T]:
        """What `find(0)` finds within the window; empty: nothing.

        now_ns: time.perf_counter_ns().
        """
        until_ns = now_ns + self.ns
        while not (found := find(0)):
            looked_ns, now_ns = now_ns, _after_others()
            if now_ns - looked_ns >= CROWDED_NS:
                self._close(now_ns)
                return ()
            if now_ns >= until_ns:
                return ()
        return found

    def waited(self, waited_ns: int, now_ns: int) -> None:
        """News came after this long, looking and sleeping together."""
        if waited_ns <= self.ns or now_ns < self._closed_until_ns:
            return
        if waited_ns <= self._longest_ns:
            self.ns = min(max(2 * self.ns, SHORTEST_NS), self._longest_ns)
        elif self.ns:
            self.ns = self.ns // 2 if self.ns >= 2 * SHORTEST_NS else 0

    def _close(self, now_ns: int) -> None:
        is_relapse = now_ns - self._closed_until_ns < self._closed_ns
        self._closed_ns = min(2 * self._closed_ns, CLOSED_NS_MAX) if is_relapse else CLOSED_NS_MIN
        self._closed_until_ns = now_ns + self._closed_ns
        self.ns = 0


def _after_others() -> int:
    """The time when whoever has work to do on this core has had a turn."""
    os.sched_yield()
    return time.perf_counter_ns()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
