# SPDX-License-Identifier: Apache-2.0
"""Compilations, and what processes do that compile together or die of it."""

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from thirdrail_engines.compiling import CompileServices, compile_plan
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plan_requests import onnxruntime_version
from thirdrail_engines.plans import Builder, PlanRequest

GIB = 1 << 30
BUILD_PHASES = ["starting the build", "reading", "optimising", "writing"]

TellPhase = Callable[[str], None]


def request_for(path: Path) -> PlanRequest:
    return PlanRequest(path, Builder.ONNXRUNTIME, onnxruntime_version())


class Services:
    """CompileServices that remember the phases that they were told.

    at: what to do when a phase is told first, by its name.
    """

    def __init__(self, cache: PlanCache | None, **at: Callable[[], object]) -> None:
        self.phases: list[str] = []
        self.cancelled = threading.Event()
        self.given = CompileServices(cache, tell=self._tell, cancelled=self.cancelled)
        self._at = at

    def _tell(self, phase: str, done: int, steps: int) -> None:
        if phase not in self.phases:
            self.phases.append(phase)
            self._at.get(phase, lambda: None)()


# What processes do. Each is called with a pipe first, by support.killable.


def compile_and_say(pipe: Connection, folder: Path, path: Path) -> None:
    """Whether it came from the cache, and the digest of the plan; and until then, each phase."""
    with PlanCache(folder, GIB) as cache:
        pipe.send("ready")
        pipe.recv()
        plan, is_hit = compile_plan(request_for(path), CompileServices(cache))
        pipe.send((is_hit, plan.manifest.plan_sha256))
        pipe.recv()


def die_while_building(pipe: Connection, folder: Path, path: Path) -> None:
    with PlanCache(folder, GIB) as cache:
        services = Services(cache, optimising=lambda: os.kill(os.getpid(), signal.SIGKILL))
        compile_plan(request_for(path), services.given)
