# SPDX-License-Identifier: Apache-2.0
"""A scheduler with its shell: performs the actions, moves the clock, keeps the books."""

from collections.abc import Hashable
from typing import Any

import pytest

from thirdrail_server.worker.policy import QueuePolicy
from thirdrail_server.worker.queued import Queued
from thirdrail_server.worker.scheduler import Action, Batch, Scheduler, Start


class Drive:
    """Times are in microseconds. Every step checks what must hold always."""

    def __init__(self, *, instances: int = 1, requests_max: int = 100, **policy: Any) -> None:
        self.policy = QueuePolicy(requests_max=requests_max, **policy)
        self.scheduler = Scheduler(self.policy, instances=instances)
        self.instances = instances
        self.now_us = 0
        self.arrived: dict[Hashable, Queued] = {}
        self.waiting: dict[Hashable, Queued] = {}
        self.running: list[Batch] = []
        self.batches: list[list[Any]] = []  # the keys of every batch that was started
        self.started_us: dict[Hashable, int] = {}
        self.ends: dict[Hashable, str] = {}  # "answered", or the name of the error
        self.ended_us: dict[Hashable, int] = {}
        self.texts: dict[Hashable, str] = {}

    def arrive(
        self,
        *keys: Hashable,
        flow: Hashable = "flow",
        priority: int = 0,
        rows: int = 1,
        signature: Hashable = "signature",
        deadline_us: int | None = None,
        timeout_us: int = 0,
    ) -> None:
        """deadline_us: from now. timeout_us: the wait that the requests ask for."""
        priority = self.policy.resolve_priority(priority)
        wait_us = self.policy.of(priority).wait_us(timeout_us)
        for key in keys:
            queued = Queued(
                key=key,
                flow=flow,
                priority=priority,
                rows=rows,
                signature=signature,
                arrived_ns=self.now_us * 1000,
                deadline_ns=None if deadline_us is None else (self.now_us + deadline_us) * 1000,
                timeout_ns=(self.now_us + wait_us) * 1000 if wait_us else None,
            )
            self.arrived[key] = self.waiting[key] = queued
            self.ends.pop(key, None)
            self._perform(self.scheduler.arrive(queued, self.now_us * 1000))

    def cancel(self, key: Hashable) -> None:
        self._perform(self.scheduler.cancel(key, self.now_us * 1000))

    def wait(self, us: int) -> None:
        """Let time pass, calling `tick` when the scheduler asks for it and not otherwise."""
        until_us = self.now_us + us
        while (wake_at_ns := self.scheduler.wake_at_ns) is not None:
            wake_at_us = -(-wake_at_ns // 1000)
            assert wake_at_us > self.now_us, "the scheduler asks to be called again at once"
            if wake_at_us > until_us:
                break
            self.now_us = wake_at_us
            self.tick()
        self.now_us = until_us

    def tick(self) -> None:
        self._perform(self.scheduler.tick(self.now_us * 1000))

    def finish(self, *, run_us: int | None = 0) -> None:
        """The batch that was started first is over. run_us: None if it failed."""
        batch = self.running.pop(0)
        run_ns = None if run_us is None else run_us * 1000
        owed, actions = self.scheduler.finished(batch, self.now_us * 1000, run_ns)
        for queued in owed:
            self._end(queued.key, "answered")
        self._perform(actions)

    def finish_all(self) -> None:
        while self.running:
            self.finish()

    def stop(self, *, at_once: bool = False) -> None:
        self._perform(self.scheduler.stop(self.now_us * 1000, "stopped", at_once=at_once))

    def die(self) -> None:
        self._perform(self.scheduler.die("died"))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._start(action.batch)
            else:
                self.texts[action.key] = action.error.message
                self._end(action.key, type(action.error).__name__)
        assert self.scheduler.queued_count == len(self.waiting)

    def _start(self, batch: Batch) -> None:
        self.running.append(batch)
        self.batches.append([member.key for member in batch.members])
        assert len(self.running) <= self.instances
        assert batch.rows == sum(member.rows for member in batch.members)
        assert batch.rows <= self.policy.rows_max or len(batch.members) == 1
        assert len({member.signature for member in batch.members}) == 1
        for member in batch.members:
            assert member.deadline_ns is None or member.deadline_ns > self.now_us * 1000
            del self.waiting[member.key]
            self.started_us[member.key] = self.now_us

    def _end(self, key: Hashable, how: str) -> None:
        assert key in self.arrived, f"{key} ended without having arrived"
        assert key not in self.ends, f"{key} ended twice: {self.ends[key]}, then {how}"
        self.ends[key] = how
        self.ended_us[key] = self.now_us
        self.waiting.pop(key, None)


@pytest.fixture(scope="session")
def drive() -> type[Drive]:
    """The class, so that property tests can build as many as they need."""
    return Drive
