# SPDX-License-Identifier: Apache-2.0
"""The worker's alarm: rings once, when it should, and not when it was set anew."""

import asyncio
import time

from support.open_files import open_files, opened_since
from thirdrail_server.worker.alarm import Alarm

MS = 1_000_000


def rings_of(*moves: tuple[int | None, float]) -> list[int]:
    """Set an alarm to now + ms, or to nothing, and wait so long each time; 0: the loop has no turn
    before the next. Returns when it rang, in nanoseconds from the start."""
    rang: list[int] = []

    async def run() -> None:
        start_ns = time.monotonic_ns()
        alarm = Alarm(
            asyncio.get_running_loop(), lambda: rang.append(time.monotonic_ns() - start_ns)
        )
        for after_ms, wait_s in moves:
            alarm.set(None if after_ms is None else time.monotonic_ns() + after_ms * MS)
            if wait_s:
                await asyncio.sleep(wait_s)
        alarm.close()

    asyncio.run(run())
    return rang


def test_it_rings_once_and_not_too_early() -> None:
    (rang_ns,) = rings_of((20, 0.1))
    assert rang_ns >= 20 * MS


def test_a_moment_that_has_passed_rings_at_once() -> None:
    assert len(rings_of((-5, 0.02))) == 1


def test_only_the_last_setting_counts() -> None:
    (rang_ns,) = rings_of((5, 0), (40, 0.1))
    assert rang_ns >= 40 * MS
    assert rings_of((5, 0), (None, 0.05)) == []


def test_it_can_be_set_again_after_it_rang() -> None:
    assert len(rings_of((1, 0.03), (1, 0.03))) == 2


def test_closing_leaves_no_descriptor() -> None:
    before = open_files()
    rings_of((1, 0.01))
    assert opened_since(before) == []


def test_a_closed_alarm_never_rings() -> None:
    async def run() -> None:
        alarm = Alarm(asyncio.get_running_loop(), lambda: None)
        alarm.close()
        alarm.set(time.monotonic_ns() + MS)
        await asyncio.sleep(0.01)

    asyncio.run(run())
