# SPDX-License-Identifier: Apache-2.0
"""Several processes on one folder, some of which are killed in the middle of everything."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from support.killable import killable, until
from support.plan_caches import (
    STEPS,
    content,
    die_at_event,
    keep_getting,
    key,
    put,
    put_and_say,
    tell_nobody,
)
from thirdrail_engines.plan_cache import PlanCache

MIB = 1 << 20


def test_two_processes_put_the_same_plan(cache: PlanCache, folder: Path) -> None:
    with (
        killable(put_and_say, folder, "a", 30) as one,
        killable(put_and_say, folder, "a", 30) as other,
    ):
        assert (one.hear(), other.hear()) == ("ready", "ready")
        one.pipe.send("go")
        other.pipe.send("go")
        assert (one.hear(), other.hear()) == ("done", "done")
    plan = cache.get(key("a"))
    assert plan is not None
    assert plan.data == content("a")
    assert list((folder / "work").iterdir()) == []
    assert list((folder / "locks").iterdir()) == []


def test_what_is_got_while_others_evict_is_whole(folder: Path) -> None:
    names = [f"plan-{number}" for number in range(6)]
    with (
        PlanCache(folder, 3 * MIB) as cache,
        killable(keep_getting, folder, names) as one,
        killable(keep_getting, folder, names[::-1]) as other,
    ):
        assert (one.hear(), other.hear()) == ("ready", "ready")
        for _ in range(10):
            for name in names:
                put(cache, key(name), content(name, MIB))
                cache.release(key(name))
        for each in (one, other):
            hits, wrong = each.ask("stop")
            assert not wrong
            assert hits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "stride"),
    [
        *((step, 1 if step == "build" else 6) for step in STEPS),
        *(pytest.param(step, 1, marks=pytest.mark.slow) for step in STEPS if step != "build"),
    ],
)
def test_killed_at_every_look_at_the_file_system(
    folder: Path, step: str, stride: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the moment: what is there is whole, nobody is locked out, nothing stays behind.

    stride: of so many moments one is tried.
    """
    with PlanCache(folder, 3 * MIB) as cache:
        put(cache, key("older"), content("older", MIB))
        plan = put(cache, key("old"), content("old", MIB))
        cache.note(plan, "note", b"old")
    deaths = 0
    while _dies(folder, step, deaths * stride):
        deaths += 1
        with PlanCache(folder, 3 * MIB) as cache:
            assert list((folder / "work").iterdir()) == []
            for name in ("older", "old", "new"):
                found = cache.get(key(name))
                if found is None:
                    continue
                assert found.data[:4096] == content(name)[:4096]
                assert cache.notes(found, "note") in (None, b"old", b"new")
                cache.release(key(name))
            _nobody_is_locked_out(cache)
            put(cache, key("old"), content("old", MIB))
            cache.release(key("old"))
    assert deaths > 2
    assert not caplog.records, "damage was seen"
    assert list((folder / "locks").iterdir()) == []


def _dies(folder: Path, step: str, number: int) -> bool:
    with killable(die_at_event, folder, step, number) as child:
        assert child.hear() == "ready"
        try:
            return bool(child.hear() != "done")
        except EOFError:
            until(lambda: child.process.exitcode == -signal.SIGKILL)
            return True


def _nobody_is_locked_out(cache: PlanCache) -> None:
    gives_up = threading.Event()
    timer = threading.Timer(60, gives_up.set)
    timer.start()
    with cache.building(key("new"), gives_up, tell_nobody):
        timer.cancel()


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path) -> None:
    """Where no audit event tells: inside writes and syncs, by the clock."""
    for round_ in range(60):
        with contextlib.ExitStack() as stack:
            putters = [
                stack.enter_context(killable(put_and_say, folder, name, 10_000)) for name in "abc"
            ]
            for each in putters:
                assert each.hear() == "ready"
                each.pipe.send("go")
            assert not putters[0].pipe.poll(0.003 * round_ % 0.1)
            for each in putters:
                os.kill(each.pid, signal.SIGKILL)
        with PlanCache(folder, 100 * MIB) as cache:
            assert list((folder / "work").iterdir()) == []
            for name in "abc":
                plan = cache.get(key(name))
                assert plan is None or plan.data == content(name)
            _nobody_is_locked_out(cache)
