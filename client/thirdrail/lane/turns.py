# SPDX-License-Identifier: Apache-2.0
"""Taking turns at reading one socket, without a thread of its own: whoever waits reads for all.

A thread that waits for something becomes the leader if there is none: it reads packets, whomever
they are for, until its own thing has come, and hands the lead to another that waits. The others
sleep until their thing has come or the lead is theirs. One lock guards all of it; nothing foreign
runs under it, and nobody sleeps or reads with it held.

Not everything comes by a packet: room may be given back by another thread. A leader who waits for
such a thing looks out for that as well.
"""

import threading
import time
from collections.abc import Callable

# Longer waits are the same as waiting for ever to locks and poll(2), which refuse them.
WAIT_S_MAX = 1_000_000.0
READ_AHEAD_PACKETS_MAX = 64


class Ticket:
    """Something that a packet will bring. `is_done` is set once, under the lock of the turns."""

    __slots__ = ("is_done", "sleepers")

    def __init__(self) -> None:
        self.is_done = False
        self.sleepers: list[threading.Lock] | None = None


class Notice(Ticket):
    """Something that other threads may bring as well."""

    __slots__ = ()


class Turns:
    """Who reads.

    lock: the owner's, for all that the reading changes.
    read: reads one packet and acts on it; called by one thread at a time, without the lock. Takes a
        monotonic deadline in seconds or None, and returns False when it passed.
    expects_more: whether enough is still to come to look for it before it is waited for.
    look_out: waits for a packet, or for `ring`; False: the deadline passed, or there are no more.
    """

    def __init__(
        self,
        lock: threading.Lock,
        read: Callable[[float | None], bool],
        expects_more: Callable[[], bool] = lambda: False,
        look_out: Callable[[float | None], bool] = lambda _: False,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        self._lock = lock
        self._read = read
        self._expects_more = expects_more
        self._look_out = look_out
        self._ring_leader = ring
        self._is_led = False
        self._led_for: Ticket | None = None  # what the leader waits for
        self._asleep: dict[threading.Lock, None] = {}  # who waits, the longest first
        self._offered: threading.Lock | None = None  # whom the lead was handed to, until taken

    @property
    def is_led(self) -> bool:
        """Whether somebody reads."""
        return self._is_led

    @property
    def sleepers(self) -> int:
        """How many wait for somebody else's reading."""
        return len(self._asleep)

    def wait(self, ticket: Ticket, deadline_s: float | None) -> bool:
        """Until the ticket is done; False: the deadline passed first, or there is nothing more to
        read.
        """
        while True:
            with self._lock:
                if ticket.is_done:
                    return True
                is_leader = not self._is_led
                if is_leader:
                    self._is_led, self._offered, self._led_for = True, None, ticket
                else:
                    bell = self._lie_down(ticket)
            if is_leader:
                return self._lead(ticket, deadline_s)
            if not self._sleep(ticket, bell, deadline_s):
                return ticket.is_done

    def poll(self) -> None:
        """Read what has come already, unless somebody else is reading."""
        with self._lock:
            if self._is_led:
                return
            self._is_led, self._offered = True, None
        try:
            while self._read(0.0):
                pass
        finally:
            with self._lock:
                self._is_led = False
                self._offer()

    def complete(self, ticket: Ticket) -> None:
        """Wake whoever waits for the ticket. To be called with the lock held."""
        ticket.is_done = True
        if ticket is self._led_for and isinstance(ticket, Notice):
            self._ring_leader()
        if ticket.sleepers is not None:
            for bell in ticket.sleepers:
                self._ring(bell)
            ticket.sleepers = None

    def _lead(self, ticket: Ticket, deadline_s: float | None) -> bool:
        try:
            if isinstance(ticket, Notice):
                while not ticket.is_done and self._look_out(deadline_s):
                    self._read(0.0)
            else:
                while not ticket.is_done and self._read(deadline_s):
                    pass
            self._read_ahead()
            return ticket.is_done
        finally:
            with self._lock:
                self._is_led, self._led_for = False, None
                if self._asleep:
                    self._offer()

    def _read_ahead(self) -> None:
        """Take in what has come for others. Who keeps many calls in flight would otherwise read one
        answer for each request, and the worker wake up for each: half as many calls a second."""
        for _ in range(READ_AHEAD_PACKETS_MAX):
            if not self._expects_more() or not self._read(0.0):
                return

    def _lie_down(self, ticket: Ticket) -> threading.Lock:
        bell = threading.Lock()
        bell.acquire()
        self._asleep[bell] = None
        if ticket.sleepers is None:
            ticket.sleepers = []
        ticket.sleepers.append(bell)
        return bell

    def _sleep(self, ticket: Ticket, bell: threading.Lock, deadline_s: float | None) -> bool:
        has_rung = False
        try:
            has_rung = bell.acquire(timeout=seconds_left(deadline_s))
        finally:
            if ticket.is_done or not has_rung:
                self._decline(bell)
        return has_rung

    def _decline(self, bell: threading.Lock) -> None:
        """Whoever goes on to something else passes on the lead, if it was meant for him."""
        with self._lock:
            self._asleep.pop(bell, None)
            if self._offered is bell:
                self._offer()

    def _offer(self) -> None:
        self._offered = next(iter(self._asleep), None)
        if self._offered is not None:
            self._ring(self._offered)

    def _ring(self, bell: threading.Lock) -> None:
        if self._asleep.pop(bell, self) is None:
            bell.release()


def seconds_left(deadline_s: float | None) -> float:
    """For a lock's `acquire`: -1 waits for ever."""
    if deadline_s is None:
        return -1
    return min(max(0.0, deadline_s - time.monotonic()), WAIT_S_MAX)
