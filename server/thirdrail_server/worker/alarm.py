# SPDX-License-Identifier: Apache-2.0
"""A timer of the event loop that is exact to microseconds.

asyncio rounds its timers up to whole milliseconds, because epoll's timeout counts in those; a queue
delay of 200 us would become 1 ms or more. A timerfd is a file that becomes readable at a moment
given in nanoseconds (timerfd_create(2)). Python has it from 3.13 on; until then it is called
through ctypes.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable

CLOCK_MONOTONIC = 1  # time.monotonic_ns()'s clock
TFD_TIMER_ABSTIME = 1
_NS_PER_S = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Calls `ring` on the loop once the moment that was set has come."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._at_ns: int | None = None
        self._fd = _checked(
            _libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC), "timerfd_create"
        )
        loop.add_reader(self._fd, self._on_readable)

    def set(self, at_ns: int | None) -> None:
        """Ring at this moment of time.monotonic_ns(), in place of any other; None: not at all.

        A closed alarm never rings.
        """
        if at_ns == self._at_ns or self._fd < 0:
            return
        self._at_ns = at_ns
        seconds, nanoseconds = divmod(at_ns or 0, _NS_PER_S)  # zero disarms
        when = _Itimerspec(value=_Timespec(seconds, nanoseconds))
        set_time = _libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(when), None)
        _checked(set_time, "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew in the meantime
            os.read(self._fd, 8)
            self._at_ns = None
            self._ring()


def _checked(result: int, call: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
    return int(result)
