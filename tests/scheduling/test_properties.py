# SPDX-License-Identifier: Apache-2.0
"""What holds whatever happens, in whatever order.

The books that `Drive` keeps do most of the checks: nothing ends twice, no batch is too large or
mixed, no more batches run than there are instances, nothing starts after its deadline.
"""

from collections import Counter
from itertools import count
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from thirdrail_server.worker.policy import LevelPolicy

Drive = Any  # the class that the fixture `drive` gives, see conftest.py

bounded = settings(max_examples=150, stateful_step_count=40, deadline=None, database=None)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Any policy; sizes are small so that all limits are met often."""
    rows_max = draw(st.integers(0, 5))
    sizes = st.lists(st.integers(1, rows_max), max_size=2) if rows_max else st.just([])
    levels = draw(st.integers(0, 3))
    level: dict[str, Any] = {
        "requests_max": draw(st.integers(1, 8)),
        "timeout_us_default": draw(st.sampled_from([0, 0, 30])),
        "allow_timeout_override": draw(st.booleans()),
        "timeout_action": draw(st.sampled_from(["reject", "delay"])),
    }
    return level | {
        "rows_max": rows_max,
        "preferred_rows": tuple(draw(sizes)),
        "delay_us_max": draw(st.sampled_from([0, 0, 20, 3000])),
        "priority_levels": levels,
        "default_priority": draw(st.integers(1, levels)) if levels else 0,
        "overrides": {1: LevelPolicy(**level)} if levels and draw(st.booleans()) else {},
    }


class AnyInterleaving(RuleBasedStateMachine):
    """Everything that can happen to a scheduler, until it is over; then everybody has ended."""

    drive: Drive

    @initialize(
        policy=policies(),
        instances=st.integers(1, 3),
        is_punctual=st.booleans(),
        arrivals_before_stop=st.integers(0, 20),
    )
    def build(
        self, policy: dict[str, Any], instances: int, is_punctual: bool, arrivals_before_stop: int
    ) -> None:
        self.model = self.drive(instances=instances, **policy)
        self.arrivals_before_stop = arrivals_before_stop
        self.keys = count()
        self.is_punctual = is_punctual  # whether tick is called when the scheduler asks for it

    @rule(
        flow=st.integers(1, 3),
        priority=st.integers(0, 3),
        rows=st.integers(1, 5),
        signature=st.sampled_from(["wide", "narrow"]),
        deadline_us=st.none() | st.integers(0, 60) | st.just(5000),
        timeout_us=st.sampled_from([0, 10, 50]),
    )
    def arrive(self, priority: int, rows: int, **request: Any) -> None:
        policy = self.model.policy
        self.model.arrive(
            next(self.keys),
            priority=min(priority, policy.priority_levels),
            rows=min(rows, policy.rows_max or rows),
            **request,
        )

    @rule(data=st.data())
    @precondition(lambda self: self.model.arrived)
    def cancel(self, data: st.DataObject) -> None:
        self.model.cancel(data.draw(st.sampled_from(sorted(self.model.arrived))))

    @rule(run_us=st.none() | st.integers(0, 40) | st.just(2000))
    @precondition(lambda self: self.model.running)
    def finish(self, run_us: int | None) -> None:
        self.model.finish(run_us=run_us)

    @rule(us=st.integers(0, 60) | st.just(3000))
    def wait(self, us: int) -> None:
        if not self.is_punctual:
            self.model.tick()
        self.model.wait(us)

    @rule(us=st.integers(1, 60))
    @precondition(lambda self: not self.is_punctual)
    def be_late(self, us: int) -> None:
        self.model.now_us += us

    @rule(at_once=st.booleans())
    @precondition(lambda self: len(self.model.arrived) >= self.arrivals_before_stop)
    def stop(self, at_once: bool) -> None:
        self.model.stop(at_once=at_once)
        if at_once:
            assert not self.model.waiting

    @rule()
    @precondition(lambda self: len(self.model.arrived) >= self.arrivals_before_stop)
    def die(self) -> None:
        self.model.die()
        assert self.model.arrived.keys() == self.model.ends.keys()

    @invariant()
    def requests_wait_run_or_have_ended(self) -> None:
        model = self.model
        running = {member.key for batch in model.running for member in batch.members}
        assert model.waiting.keys() | running | model.ends.keys() == model.arrived.keys()
        assert not model.waiting.keys() & (running | model.ends.keys())
        assert model.scheduler.running_count == len(running - model.ends.keys())

    @invariant()
    def every_priority_keeps_its_bound(self) -> None:
        policy = self.model.policy
        waiting = Counter(queued.priority for queued in self.model.waiting.values())
        assert all(n <= policy.of(priority).requests_max for priority, n in waiting.items())

    @invariant()
    def a_free_instance_leaves_nobody_waiting_without_a_reason(self) -> None:
        model = self.model
        if model.waiting and len(model.running) < model.instances:
            assert model.policy.delay_us_max > 0
            assert model.scheduler.wake_at_ns is not None

    def teardown(self) -> None:
        """Only what the scheduler asks for happens now, and everybody ends, exactly once."""
        if not hasattr(self, "model"):
            return
        model = self.model
        if not self.is_punctual:
            model.tick()
        while not model.scheduler.is_idle:
            model.wait(10_000)
            if model.running:
                model.finish()
        assert model.ends.keys() == model.arrived.keys()
        assert model.scheduler.wake_at_ns is None
        if self.is_punctual:
            timed_out = {key for key, end in model.ends.items() if end == "TimedOut"}
            assert all(model.ended_us[key] == end_us(model, key) for key in timed_out)


def end_us(model: Any, key: int) -> int:
    """When a request has to end if it has not started by then."""
    queued = model.arrived[key]
    ends = [queued.deadline_ns]
    if model.policy.of(queued.priority).timeout_action == "reject":
        ends.append(queued.timeout_ns)
    return int(min(end for end in ends if end is not None)) // 1000


def test_every_request_ends_exactly_once_under_any_interleaving(drive: Drive) -> None:
    AnyInterleaving.drive = drive
    run_state_machine_as_test(AnyInterleaving, settings=settings(bounded, max_examples=250))


requests = st.lists(
    st.tuples(
        st.integers(1, 3),  # priority
        st.integers(1, 3),  # flow
        st.sampled_from(["wide", "narrow"]),
        st.integers(0, 2),  # batches that finish afterwards
    ),
    max_size=40,
)


@bounded
@given(requests=requests, rows_max=st.integers(0, 4), instances=st.integers(1, 2))
def test_a_higher_priority_is_never_passed_by_a_lower_one(
    drive: Drive, requests: list[tuple[int, int, str, int]], rows_max: int, instances: int
) -> None:
    model = drive(rows_max=rows_max, instances=instances, priority_levels=3, default_priority=1)

    def check_new_batches(known: int) -> None:
        for keys in model.batches[known:]:
            started = [model.arrived[key] for key in keys]
            for waiting in model.waiting.values():
                if rows_max == 0 or waiting.signature == started[0].signature:
                    assert max(member.priority for member in started) <= waiting.priority
                assert started[0].priority <= waiting.priority

    for key, (priority, flow, signature, finishes) in enumerate(requests):
        known = len(model.batches)
        model.arrive(key, priority=priority, flow=flow, signature=signature)
        check_new_batches(known)
        for _ in range(min(finishes, len(model.running))):
            known = len(model.batches)
            model.finish()
            check_new_batches(known)


@bounded
@given(
    flows=st.lists(st.integers(1, 3), max_size=30),
    rows_max=st.integers(0, 5),
    instances=st.integers(1, 3),
)
def test_while_others_wait_no_flow_has_two_turns_in_a_row(
    drive: Drive, flows: list[int], rows_max: int, instances: int
) -> None:
    model = drive(rows_max=rows_max, instances=instances)
    model.arrive(*[f"busy {number}" for number in range(instances)], flow="other")
    for key, flow in enumerate(flows):
        model.arrive(key, flow=flow)
    model.finish_all()

    served = [flows[key] for batch in model.batches[instances:] for key in batch]
    left = Counter(flows)
    last_turn: dict[int, int] = {}
    for turn, flow in enumerate(served):
        for other in +left:
            if other != flow:
                assert last_turn.get(other, -1) >= last_turn.get(flow, -1)
        last_turn[flow] = turn
        left[flow] -= 1
    assert not +left


@bounded
@given(
    others=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from(["wide", "narrow"])),
        min_size=40,
        max_size=60,
    )
)
def test_nobody_starves_however_many_smaller_ones_come(
    drive: Drive, others: list[tuple[int, int, str]]
) -> None:
    """Of n flows each leads at most once before the one that was passed over."""
    model = drive(rows_max=4)
    model.arrive("busy", flow="other")
    stream = iter(enumerate(others))
    for key, (flow, rows, signature) in (next(stream) for _ in range(10)):
        model.arrive(key, flow=flow, rows=rows, signature=signature)
    model.arrive("big", flow="big", rows=4, signature="wide")
    for key, (flow, rows, signature) in stream:
        model.finish()
        if "big" in model.started_us:
            break
        model.arrive(key, flow=flow, rows=rows, signature=signature)
    assert len(model.batches) <= 1 + 3 + 1


@settings(bounded, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 300),  # us after the one before
            st.integers(1, 4),  # rows
            st.sampled_from(["wide", "narrow"]),
            st.none() | st.integers(1001, 3000),  # us until its deadline
        ),
        max_size=30,
    ),
    preferred=st.lists(st.integers(1, 4), max_size=2),
)
def test_with_instances_to_spare_nobody_waits_longer_than_the_delay_or_too_long(
    drive: Drive,
    arrivals: list[tuple[int, int, str, int | None]],
    preferred: list[int],
) -> None:
    model = drive(instances=30, rows_max=4, preferred_rows=tuple(preferred), delay_us_max=500)
    for key, (after_us, rows, signature, deadline_us) in enumerate(arrivals):
        model.wait(after_us)
        model.arrive(key, rows=rows, signature=signature, deadline_us=deadline_us)
    model.wait(500)
    for key, queued in model.arrived.items():
        latest_us = queued.arrived_ns // 1000 + 500
        if queued.deadline_ns is not None:
            latest_us = min(latest_us, queued.deadline_ns // 1000 - 1000)
        assert model.started_us[key] <= latest_us
