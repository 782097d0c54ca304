# SPDX-License-Identifier: Apache-2.0
"""How long to look for news before sleeping.

A core that sleeps takes tens of microseconds to wake, more on a virtual machine: half of a small
call on the lane, in which two processes wait for each other in turns. Who looks for a moment before
it sleeps is there when the answer comes. Looking in vain is wasted, so it adapts as Linux's guest
halt polling does (Documentation/virt/guest-halt-polling): the window doubles while news would have
come within the longest one, halves while it would not, and so closes where calls are rare or slow.
"""

import os

LONGEST_US = 100  # about what two wake-ups cost; the most that one wait can waste
SHORTEST_NS = 10_000


class BusyWindow:
    """For one waiter. longest_us: 0 never looks; nor does a process that has one core only."""

    __slots__ = ("_longest_ns", "ns")

    def __init__(self, longest_us: int = LONGEST_US) -> None:
        if longest_us < 0:
            raise ValueError(f"a busy poll takes 0 us or more, got {longest_us}")
        self._longest_ns = longest_us * 1000 if _cores() > 1 else 0
        self.ns = 0  # how long to look next time

    def waited(self, waited_ns: int) -> None:
        """News came after this long, looking and sleeping together."""
        if waited_ns <= self.ns:
            return
        if waited_ns <= self._longest_ns:
            self.ns = min(max(2 * self.ns, SHORTEST_NS), self._longest_ns)
        elif self.ns:
            self.ns = self.ns // 2 if self.ns >= 2 * SHORTEST_NS else 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
