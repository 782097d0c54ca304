# SPDX-License-Identifier: Apache-2.0
"""One build per key at a time, over threads and processes; nobody waits for the dead."""

import contextlib
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.killable import Killable, killable, until
from support.plan_caches import build_once, content, hold_the_build, key, put, tell_nobody
from thirdrail_engines.plan_cache import PlanCache, locks
from thirdrail_engines.plans import BuildError, BuildFault

WAIT_S = 30.0
NEVER = threading.Event()
WAITED = ("waiting for another build", 0, 0)


def test_servers_that_start_together_build_once(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(killable(build_once, folder, "model", 0.3)) for _ in range(6)
        ]
        assert [each.hear() for each in servers] == ["ready"] * 6
        for each in servers:
            each.pipe.send("go")
        answers = [each.hear() for each in servers]
    assert sorted(has_built for has_built, _, _ in answers) == [False] * 5 + [True]
    assert {digest for _, _, digest in answers} == {hashlib.sha256(content("model")).hexdigest()}
    for has_built, told, _ in answers:
        assert told in ([], [WAITED])
        assert not (has_built and told)
    assert list((folder / "locks").iterdir()) == []


def test_threads_of_one_server_build_once(cache: PlanCache) -> None:
    built = []
    start = threading.Barrier(8)

    def load() -> bytes:
        start.wait(WAIT_S)
        with cache.building(key("a"), NEVER, tell_nobody):
            plan = cache.get(key("a"))
            if plan is None:
                built.append(threading.current_thread())
                time.sleep(0.05)
                plan = put(cache, key("a"), b"plan")
        return bytes(plan.data)

    with ThreadPoolExecutor(8) as pool:
        assert [each.result(WAIT_S) for each in [pool.submit(load) for _ in range(8)]] == [
            b"plan"
        ] * 8
    assert len(built) == 1


def test_other_keys_do_not_wait(cache: PlanCache) -> None:
    told: list[str] = []
    with (
        cache.building(key("a"), NEVER, tell_nobody),
        cache.building(key("b"), NEVER, lambda phase, step, steps: told.append(phase)),
    ):
        assert told == []


def test_waiting_can_be_cancelled(cache: PlanCache) -> None:
    cancelled = threading.Event()
    told: list[tuple[str, int, int]] = []

    def tell(*at: Any) -> None:
        told.append(at)
        cancelled.set()

    with cache.building(key("a"), NEVER, tell_nobody):
        with (
            pytest.raises(BuildError, match="cancelled while another build") as caught,
            cache.building(key("a"), cancelled, tell),
        ):
            pytest.fail("two build at once")
        assert caught.value.fault is BuildFault.CANCELLED
        assert told == [WAITED]
    with cache.building(key("a"), NEVER, tell_nobody):
        pass  # the cancelled one left nothing behind


def test_a_failed_build_lets_the_next_one_in(cache: PlanCache) -> None:
    with pytest.raises(RuntimeError), cache.building(key("a"), NEVER, tell_nobody):
        raise RuntimeError
    with cache.building(key("a"), NEVER, tell_nobody):
        pass


def test_a_killed_builder_leaves_nothing(
    cache: PlanCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()
    with killable(hold_the_build, folder, "a") as builder:
        left: Path = builder.hear()
        assert left.exists()
        with ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):
            waiting = pool.submit(_build_after, cache, told)
            assert told.wait(WAIT_S)
            assert not waiting.done()
            builder.kill()
            waiting.result(WAIT_S)
        assert f"process {builder.pid} builds plan" in caplog.text
    assert left.exists(), "nobody has swept yet"
    with cache.workspace():
        assert not left.exists()
    assert list((folder / "locks").iterdir()) == []


def _build_after(cache: PlanCache, told: threading.Event) -> None:
    with cache.building(key("a"), NEVER, lambda *_: told.set()):
        pass


def test_opening_a_cache_sweeps_too(folder: Path) -> None:
    with killable(hold_the_build, folder, "a") as builder:
        left: Path = builder.hear()
        PlanCache(folder, 1).close()
        assert (left / "half").exists(), "it is in use"
        builder.kill()
    PlanCache(folder, 1).close()
    assert not left.exists()


def test_a_stopped_builder_keeps_its_build(cache: PlanCache, folder: Path) -> None:
    """It may go on: that it does not move now proves nothing."""
    cancelled = threading.Event()
    with killable(hold_the_build, folder, "a") as builder:
        builder.hear()
        psutil.Process(builder.pid).suspend()
        threading.Timer(0.2, cancelled.set).start()
        with (
            pytest.raises(BuildError, match="cancelled"),
            cache.building(key("a"), cancelled, tell_nobody),
        ):
            pytest.fail("two build at once")


def test_no_two_are_inside_however_they_come_and_go(cache: PlanCache, tmp_path: Path) -> None:
    """The lock's file is made and removed all the time."""
    inside = tmp_path / "inside"

    def enter() -> None:
        for _ in range(30):
            with cache.building(key("a"), NEVER, tell_nobody):
                inside.mkdir()  # fails if there is one
                inside.rmdir()

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(enter) for _ in range(4)]:
            each.result(WAIT_S)


def test_the_lock_of_a_removed_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder leaves and another one comes."""
    path = tmp_path / "lock"
    first = contextlib.ExitStack()
    second = contextlib.ExitStack()
    assert first.enter_context(locks.locked_file(path))
    real = locks.try_lock

    def too_late(fd: int) -> bool:
        monkeypatch.setattr(locks, "try_lock", real)
        first.close()
        assert second.enter_context(locks.locked_file(path))
        assert real(fd), "it is the removed file's lock, and free"
        return True

    monkeypatch.setattr(locks, "try_lock", too_late)
    with (
        second,
        pytest.raises(locks.LockTimeout, match=f"process {os.getpid()} has kept {path} locked"),
        locks.locked_file(path, wait_s_max=0.05),
    ):
        pytest.fail("two inside")
    assert not path.exists()


def test_killed_at_any_moment_nobody_stays_locked_out(cache: PlanCache, folder: Path) -> None:
    for round_ in range(5):
        builder = Killable(hold_the_build, folder, "a")
        time.sleep(0.01 * round_)
        builder.kill()
        builder.pipe.close()
        with cache.building(key("a"), NEVER, tell_nobody):
            pass
    with cache.workspace() as work:
        until(lambda: list((folder / "work").iterdir()) == [work])
