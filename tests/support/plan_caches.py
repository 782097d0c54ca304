# SPDX-License-Identifier: Apache-2.0
"""Plans for tests of the plan cache, and what its users do in processes of their own."""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from thirdrail_engines.plan_cache import Manifest, Plan, PlanCache, PlanKey

MIB = 1 << 20


def key(name: str) -> PlanKey:
    """A key as good as any, told by its name."""
    return PlanKey(hashlib.sha256(name.encode()).hexdigest(), {"name": name})


def content(name: str, size: int = 100_000) -> bytes:
    """What a plan of this name holds: other names hold other bytes."""
    block = hashlib.sha512(name.encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def put(cache: PlanCache, of: PlanKey, data: bytes) -> Plan:
    with cache.workspace() as folder:
        (folder / "built").write_bytes(data)
        return cache.put(of, folder / "built", Manifest(build_s=1.5, source="model.onnx"))


def tell_nobody(phase: str, step: int, steps: int) -> None:
    pass


# What processes do. Each is called with a pipe first, by support.killable.


def put_and_say(pipe: Connection, folder: Path, name: str, rounds: int) -> None:
    """Puts the same plan again and again, once told to begin."""
    with PlanCache(folder, 100 * MIB) as cache:
        pipe.send("ready")
        pipe.recv()
        for _ in range(rounds):
            put(cache, key(name), content(name))
            cache.release(key(name))
    pipe.send("done")


def build_once(pipe: Connection, folder: Path, name: str, build_s: float) -> None:
    """What a server does at load. Says whether it built, and what was told while it waited."""
    told: list[tuple[str, int, int]] = []
    never = threading.Event()
    with PlanCache(folder, 100 * MIB) as cache:
        pipe.send("ready")
        pipe.recv()
        has_built = False
        plan = cache.get(key(name))
        if plan is None:
            with cache.building(key(name), never, lambda *each: told.append(each)):
                plan = cache.get(key(name))
                if plan is None:
                    has_built = True
                    never.wait(build_s)
                    plan = put(cache, key(name), content(name))
        pipe.send((has_built, told, hashlib.sha256(plan.data).hexdigest()))


def hold_the_build(pipe: Connection, folder: Path, name: str) -> None:
    """Builds for ever, with a half-made plan in its workspace."""
    with (
        PlanCache(folder, 100 * MIB) as cache,
        cache.building(key(name), threading.Event(), tell_nobody),
        cache.workspace() as work,
    ):
        (work / "half").write_bytes(b"half")
        pipe.send(work)
        pipe.poll(None)


def use_plan(pipe: Connection, folder: Path, name: str) -> None:
    with PlanCache(folder, 100 * MIB) as cache:
        plan = cache.get(key(name))
        pipe.send(plan is not None)
        pipe.poll(None)


def keep_getting(pipe: Connection, folder: Path, names: list[str]) -> None:
    """Until it is told to stop and has had a hit. Says how many hits there were, and how many of
    them were wrong."""
    hits = wrong = 0
    with PlanCache(folder, 100 * MIB) as cache:
        pipe.send("ready")
        while not hits or not pipe.poll():
            for name in names:
                plan = cache.get(key(name))
                if plan is not None:
                    hits += 1
                    wrong += plan.data != content(name, MIB)
                    cache.release(plan.key)
    pipe.send((hits, wrong))


def die_at_event(pipe: Connection, folder: Path, step: str, number: int) -> None:
    """Does a step and dies of kill -9 right before its `number`th look at the file system."""
    with PlanCache(folder, 3 * MIB) as cache:
        left = number

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in _EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        pipe.send("ready")
        sys.addaudithook(count)
        STEPS[step](cache)
        left = sys.maxsize
    pipe.send("done")


def _put_new(cache: PlanCache) -> None:
    put(cache, key("new"), content("new", MIB))


def _put_again(cache: PlanCache) -> None:
    put(cache, key("old"), content("old", MIB))


def _put_and_evict(cache: PlanCache) -> None:
    put(cache, key("new"), content("new", 2 * MIB))


def _note(cache: PlanCache) -> None:
    plan = cache.get(key("old"))
    assert plan is not None
    cache.note(plan, "note", b"new")


def _build(cache: PlanCache) -> None:
    with cache.building(key("new"), threading.Event(), tell_nobody):
        pass


STEPS: dict[str, Callable[[PlanCache], None]] = {
    "put new": _put_new,
    "put again": _put_again,
    "put and evict": _put_and_evict,
    "note": _note,
    "build": _build,
}

# Audit events of what touches files: https://docs.python.org/3/library/audit_events.html
_EVENTS = frozenset(
    (
        "open",
        "os.chmod",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.truncate",
        "os.utime",
        "fcntl.flock",
        "shutil.rmtree",
    )
)
