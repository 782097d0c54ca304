# SPDX-License-Identifier: Apache-2.0
"""One version of a model at work: its scheduler decides, this shell acts.

Everything but the engine's runs happens on the worker's loop. Runs happen on instance threads;
those of tiny models happen on the loop itself, which spares two thread switches, until one takes
too long.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable

from thirdrail.errors import ThirdrailError
from thirdrail.v1 import metrics_pb2
from thirdrail_engines.cuda.runs_under_way import stuck
from thirdrail_engines.engine import DeviceLost, Engine
from thirdrail_server.worker.alarm import Alarm
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.execution import Execution, execute
from thirdrail_server.worker.instance_threads import InstanceThreads
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.memory import UNKNOWN, Weight
from thirdrail_server.worker.policy import QueuePolicy
from thirdrail_server.worker.queued import Queued
from thirdrail_server.worker.run_place import RunHistory, RunPlace
from thirdrail_server.worker.scheduler import Action, Batch, Scheduler, Start
from thirdrail_server.worker.statistics import VersionStatistics
from thirdrail_server.worker.version_spec import VersionSpec

log = logging.getLogger(__name__)

OnDeviceLost = Callable[[DeviceLost], None]


class ServedVersion:
    """Requests in, endings out; each exactly once."""

    def __init__(
        self,
        spec: VersionSpec,
        engine: Engine,
        policy: QueuePolicy,
        *,
        instances: int,
        place: RunPlace,
        weight: Weight = UNKNOWN,
        on_device_lost: OnDeviceLost = lambda error: None,
    ) -> None:
        """on_device_lost: called on the loop when those whom it hit have been answered."""
        self.spec = spec
        self.weight = weight
        self.statistics = VersionStatistics(spec.model, spec.version)
        self._engine = engine
        self._policy = policy
        self._on_device_lost = on_device_lost
        # On a device, the copies of one run overlap the computing of another.
        at_once = instances * max(1, engine.spec.overlapped_runs)
        self._scheduler = Scheduler(policy, instances=at_once)
        self._threads = InstanceThreads(f"{spec.model}/{spec.version}", at_once)
        self._runs = RunHistory(place)
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._loop, self._on_alarm)
        self.closed: asyncio.Future[None] = self._loop.create_future()  # the engine is, by `retire`
        self._idle: asyncio.Future[None] | None = None
        self._answered: set[Batch] = set()  # still running, for all the loop knows
        self._watched: dict[Batch, asyncio.TimerHandle] = {}
        self._actions: deque[Action] = deque()
        self._is_performing = False

    @property
    def runs_on_loop(self) -> bool:
        return self._runs.on_loop

    @property
    def run_s_max(self) -> float:
        """See EngineSpec."""
        return self._engine.spec.run_s_max

    @property
    def is_idle(self) -> bool:
        """No request waits, and each that runs has its answer.

        Who got it may ask for the model's room before the loop has heard that the run is over.
        """
        waiting, busy = self._scheduler.queued_count, self._scheduler.busy_instances
        return not waiting and busy == len(self._answered)

    @property
    def used_ms(self) -> int:
        """When it was loaded or last answered, by the unix clock."""
        return max(self.weight.loaded_ms, self.statistics.last_request_unix_ms)

    def submit(
        self, call: Call, *, flow: Hashable, priority: int, timeout_us: int, now_ns: int
    ) -> None:
        """Take a request. It may have ended before this returns."""
        try:
            priority = self._policy.resolve_priority(priority)
        except ThirdrailError as error:
            return self._end(call, error)
        wait_us = self._policy.of(priority).wait_us(timeout_us)
        queued = Queued(
            key=call,
            flow=flow,
            priority=priority,
            rows=call.member.request.rows,
            signature=call.member.request.signature,
            arrived_ns=now_ns,
            deadline_ns=now_ns + timeout_us * 1000 if timeout_us else None,
            timeout_ns=now_ns + wait_us * 1000 if wait_us else None,
        )
        self._perform(self._scheduler.arrive(queued, now_ns))

    def run_now(self, member: Member, *, priority: int, now_ns: int) -> Ending | None:
        """Run a request on the loop at once, if that is what `submit` would come to: for a tiny
        model without anybody waiting. It spares the way through the scheduler, which takes longer
        than such a run. None: it must be submitted. The answer is owed by the caller.
        """
        if (
            self._runs.is_suspect
            or not self._runs.is_for_loop(member.request.input_bytes)
            or not self._scheduler.starts_newcomers
        ):
            return None
        if priority:
            try:
                self._policy.resolve_priority(priority)
            except ThirdrailError as error:
                self.statistics.request_failed(error, time.monotonic_ns() - now_ns)
                return Ending(Outcome(member.arena, error=error))
        started_ns = time.monotonic_ns()
        execution = execute(self._engine, self.spec, (member,))
        self._runs.ran_on_loop(member.request.input_bytes, execution.total_ns)
        rows = member.request.rows
        if execution.compute_ns:
            self.statistics.batch_ran(rows, execution)
        self._count(member, execution.outcomes[0], now_ns, started_ns)
        self._note_loss(execution)
        return _ending(execution.outcomes[0], execution, rows, started_ns - now_ns)

    def cancel(self, call: Call) -> None:
        self._perform(self._scheduler.cancel(call, time.monotonic_ns()))

    def counters(self) -> metrics_pb2.ModelCounters:
        return self.statistics.snapshot(
            queued=self._scheduler.queued_count,
            running=self._scheduler.running_count,
            memory_bytes=self.weight.size,
        )

    async def retire(self, reason: str, drain_s_max: float) -> None:
        """Take nothing new, finish what is here within the bound, then give everything back.

        After the bound nobody waits for a run that is still under way: what it uses is given back
        when it ends.
        """
        self._perform(self._scheduler.stop(time.monotonic_ns(), reason))
        is_drained = await self._drain(reason, drain_s_max)
        self._alarm.close()
        self._threads.close(on_ended=self._close)
        if is_drained:
            await self.closed

    async def _drain(self, reason: str, drain_s_max: float) -> bool:
        if self._scheduler.is_idle:
            return True
        self._idle = self._loop.create_future()
        try:
            await asyncio.wait_for(self._idle, drain_s_max)
        except TimeoutError:
            log.warning(
                "%s version %s was still busy after %s s; its requests end as unavailable",
                self.spec.model,
                self.spec.version,
                drain_s_max,
            )
            self._perform(self._scheduler.die(reason))
            return False
        return True

    def _close(self) -> None:
        try:
            self._engine.close()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(_finish, self.closed)

    # Performing what the scheduler decided

    def _perform(self, actions: list[Action]) -> None:
        """A run on the loop yields further actions: they queue up here instead of nesting."""
        self._actions.extend(actions)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._actions:
                action = self._actions.popleft()
                if isinstance(action, Start):
                    self._start(action.batch)
                else:
                    self._end(action.key, action.error)
        finally:
            self._is_performing = False
        self._alarm.set(self._scheduler.wake_at_ns)
        if self._idle is not None and self._scheduler.is_idle and not self._idle.done():
            self._idle.set_result(None)

    def _start(self, batch: Batch) -> None:
        started_ns = time.monotonic_ns()
        members = []
        for queued in batch.members:
            call: Call = queued.key
            call.started_ns = started_ns
            members.append(call.member)
        self._watch(batch)
        # For the device, whatever the model takes.
        waits = any(member.device is not None for member in members)
        if not waits and self._runs.is_for_loop(members[0].request.input_bytes):
            if not self._runs.is_suspect:
                return self._run_on_loop(batch, members)
            self._runs.is_suspect = False
            return self._threads.give(lambda: self._run_on_trial(batch, members))
        self._threads.give(lambda: self._run_on_thread(batch, members))

    def _watch(self, batch: Batch) -> None:
        """See EngineSpec.run_s_max."""
        run_s_max = self._engine.spec.run_s_max
        if run_s_max:
            runs_max = 1 + len(batch.members)  # together, and after a failure one by one
            self._watched[batch] = self._loop.call_later(
                run_s_max * runs_max, self._on_device_lost, stuck(run_s_max)
            )

    def _run_on_loop(self, batch: Batch, members: list[Member]) -> None:
        execution = execute(self._engine, self.spec, members)
        self._runs.ran_on_loop(members[0].request.input_bytes, execution.total_ns)
        self._finished(batch, execution)

    def _run_on_trial(self, batch: Batch, members: list[Member]) -> None:
        started_ns = time.thread_time_ns()
        execution = execute(self._engine, self.spec, members)
        cpu_ns = time.thread_time_ns() - started_ns
        if self._runs.is_overrun(cpu_ns):
            self._runs.leave_loop()
            log.log(
                logging.DEBUG if self._runs.may_return else logging.WARNING,
                "%s version %s ran %d us, too long for the loop: it runs on threads from now on",
                self.spec.model,
                self.spec.version,
                cpu_ns // 1000,
            )
        self._ran(batch, execution)

    def _run_on_thread(self, batch: Batch, members: list[Member]) -> None:
        self._ran(batch, execute(self._engine, self.spec, members))

    def _ran(self, batch: Batch, execution: Execution) -> None:
        """On the thread that ran the batch."""
        call: Call = batch.members[0].key
        if len(batch.members) == 1 and call.on_run is not None and call.claim():
            outcome = execution.outcomes[0]
            execution.is_answered = True
            self._count_run(batch, execution)
            self._count(call.member, outcome, call.arrived_ns, call.started_ns)
            self._answered.add(batch)
            call.on_run(call, _ending_of(call, outcome, execution, batch.rows))
        try:
            self._loop.call_soon_threadsafe(self._finished_on_thread, batch, execution)
        except RuntimeError:  # the loop has ended, and with it everybody who waited
            log.debug("a run ended after the worker's loop")

    def _finished_on_thread(self, batch: Batch, execution: Execution) -> None:
        if execution.compute_ns > 0:
            input_bytes = batch.members[0].key.member.request.input_bytes
            self._runs.ran_on_thread(input_bytes, execution.total_ns)
        self._finished(batch, execution)

    def _finished(self, batch: Batch, execution: Execution) -> None:
        now_ns = time.monotonic_ns()
        self._answered.discard(batch)
        if watch := self._watched.pop(batch, None):
            watch.cancel()
        has_run = execution.compute_ns > 0
        run_ns = execution.compute_ns if has_run and execution.is_one_run else None
        owed, actions = self._scheduler.finished(batch, now_ns, run_ns)
        if not execution.is_answered:
            self._count_run(batch, execution)
            self._answer_all(batch, execution, {queued.key for queued in owed})
        self._note_loss(execution)
        self._perform(actions)

    def _note_loss(self, execution: Execution) -> None:
        if execution.device_lost is not None:
            self._on_device_lost(execution.device_lost)

    def _answer_all(self, batch: Batch, execution: Execution, owed: set[Call]) -> None:
        for queued, outcome in zip(batch.members, execution.outcomes, strict=True):
            call: Call = queued.key
            if call in owed and call.claim():
                self._count(call.member, outcome, call.arrived_ns, call.started_ns)
                call.on_ended(call, _ending_of(call, outcome, execution, batch.rows))
            else:
                outcome.discard()

    def _count_run(self, batch: Batch, execution: Execution) -> None:
        if execution.compute_ns > 0:
            self.statistics.batch_ran(batch.rows, execution)

    def _count(self, member: Member, outcome: Outcome, arrived_ns: int, started_ns: int) -> None:
        """A request that ran has ended."""
        total_ns = time.monotonic_ns() - arrived_ns
        if outcome.error is None:
            rows, queue_ns = member.request.rows, started_ns - arrived_ns
            self.statistics.request_succeeded(rows, queue_ns, total_ns)
        else:
            self.statistics.request_failed(outcome.error, total_ns)

    def _end(self, call: Call, error: ThirdrailError) -> None:
        if not call.claim():  # the thread that ran it answers
            return
        self.statistics.request_failed(error, time.monotonic_ns() - call.arrived_ns)
        call.on_ended(call, Ending(Outcome(call.member.arena, error=error)))

    def _on_alarm(self) -> None:
        self._perform(self._scheduler.tick(time.monotonic_ns()))


def _ending_of(call: Call, outcome: Outcome, execution: Execution, batch_rows: int) -> Ending:
    return _ending(outcome, execution, batch_rows, call.started_ns - call.arrived_ns)


def _ending(outcome: Outcome, execution: Execution, batch_rows: int, queue_ns: int) -> Ending:
    return Ending(
        outcome,
        queue_ns,
        execution.input_copy_ns,
        execution.compute_ns,
        execution.output_copy_ns,
        batch_rows,
    )


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
