# SPDX-License-Identifier: Apache-2.0
"""How requests end without an answer: refused, expired, cancelled, stopped. Times are in us."""

from typing import Any

import pytest

from thirdrail_server.worker.policy import LevelPolicy, QueuePolicy

Drive = Any  # the class that the fixture `drive` gives, see conftest.py


class TestBounds:
    def test_a_full_queue_refuses(self, drive: Drive) -> None:
        model = drive(requests_max=2)
        model.arrive("busy", "a", "b", "c")
        assert model.ends == {"c": "QueueFull"}
        assert model.texts["c"] == "Exceeds maximum queue size"
        model.finish()
        model.arrive("d")
        model.finish_all()
        assert model.batches == [["busy"], ["a"], ["b"], ["d"]]

    def test_requests_whose_time_is_over_make_room(self, drive: Drive) -> None:
        model = drive(requests_max=1)
        model.arrive("busy")
        model.arrive("a", deadline_us=10)
        model.now_us += 10  # nobody called tick
        model.arrive("b")
        assert model.ends == {"a": "TimedOut"}

    def test_each_priority_has_a_bound_of_its_own(self, drive: Drive) -> None:
        model = drive(
            requests_max=1,
            priority_levels=2,
            default_priority=2,
            overrides={1: LevelPolicy(requests_max=2)},
        )
        model.arrive("busy", "a", "b")
        model.arrive("A", "B", "C", priority=1)
        assert model.ends == {"b": "QueueFull", "C": "QueueFull"}


class TestDeadlines:
    def test_a_request_waits_until_its_deadline_and_then_never_runs(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy")
        model.arrive("a", deadline_us=10)
        model.wait(9)
        assert model.ends == {}
        model.wait(1)
        assert model.ends == {"a": "TimedOut"}
        assert model.texts["a"] == "Request timeout expired"
        model.finish_all()
        assert model.batches == [["busy"]]

    def test_one_that_arrives_too_late_never_runs(self, drive: Drive) -> None:
        model = drive()
        model.arrive("a", deadline_us=0)
        assert model.ends == {"a": "TimedOut"}
        assert model.batches == []

    def test_a_late_finish_does_not_start_what_expired_meanwhile(self, drive: Drive) -> None:
        model = drive(rows_max=2)
        model.arrive("busy")
        model.arrive("a", deadline_us=10)
        model.arrive("b", deadline_us=11)
        model.now_us += 10  # nobody called tick
        model.finish()
        assert model.ends == {"busy": "answered", "a": "TimedOut"}
        assert model.batches == [["busy"], ["b"]]

    def test_a_run_answers_although_the_deadline_passed_meanwhile(self, drive: Drive) -> None:
        model = drive()
        model.arrive("a", deadline_us=10)
        model.wait(20)
        model.finish()
        assert model.ends == {"a": "answered"}


class TestTimeouts:
    """The longest wait that the policy grants."""

    def test_rejected_when_it_is_over(self, drive: Drive) -> None:
        model = drive(timeout_us_default=10)
        model.arrive("a", "b")
        model.wait(9)
        assert model.ends == {}
        model.wait(1)
        assert model.ends == {"b": "TimedOut"}

    def test_delayed_behind_the_punctual_of_its_priority(self, drive: Drive) -> None:
        delaying = LevelPolicy(requests_max=9, timeout_us_default=10, timeout_action="delay")
        model = drive(priority_levels=2, default_priority=1, overrides={1: delaying})
        model.arrive("busy", "late")
        model.arrive("low", priority=2)
        model.wait(9)
        model.arrive("a", "b", flow="newcomer")
        model.wait(1)
        assert model.ends == {}
        model.finish_all()
        assert model.batches == [["busy"], ["a"], ["b"], ["late"], ["low"]]

    def test_the_delayed_still_count_and_can_be_cancelled(self, drive: Drive) -> None:
        model = drive(requests_max=2, timeout_us_default=10, timeout_action="delay")
        model.arrive("busy", "late", "later")
        model.wait(10)
        model.arrive("more")
        model.cancel("late")
        assert model.ends == {"more": "QueueFull", "late": "Cancelled"}

    def test_a_deadline_ends_the_delayed_too(self, drive: Drive) -> None:
        model = drive(timeout_us_default=10, timeout_action="delay")
        model.arrive("busy")
        model.arrive("a", deadline_us=30)
        model.wait(29)
        assert model.ends == {}
        model.wait(1)
        assert model.ends == {"a": "TimedOut"}

    def test_a_deadline_before_the_timeout_ends_it(self, drive: Drive) -> None:
        model = drive(timeout_us_default=30, timeout_action="delay")
        model.arrive("busy")
        model.arrive("a", deadline_us=10)
        model.wait(10)
        assert model.ends == {"a": "TimedOut"}

    def test_each_priority_can_have_its_own(self, drive: Drive) -> None:
        model = drive(
            priority_levels=2,
            default_priority=2,
            overrides={1: LevelPolicy(requests_max=9, timeout_us_default=10)},
        )
        model.arrive("busy", "patient")
        model.arrive("impatient", priority=1)
        model.wait(1000)
        assert model.ends == {"impatient": "TimedOut"}

    @pytest.mark.parametrize(
        ("default_us", "allowed", "requested_us", "granted_us"),
        [
            (0, False, 0, 0),
            (0, False, 50, 0),
            (0, True, 50, 50),
            (100, False, 50, 100),
            (100, True, 50, 50),
            (100, True, 0, 100),
            (100, True, 200, 100),
        ],
    )
    def test_a_request_may_shorten_its_wait_where_allowed(
        self, default_us: int, allowed: bool, requested_us: int, granted_us: int
    ) -> None:
        level = LevelPolicy(
            requests_max=1, timeout_us_default=default_us, allow_timeout_override=allowed
        )
        assert level.wait_us(requested_us) == granted_us


class TestCancel:
    def test_a_waiting_request_leaves(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", "a", "b")
        model.cancel("a")
        assert model.ends == {"a": "Cancelled"}
        model.finish_all()
        assert model.batches == [["busy"], ["b"]]

    def test_a_running_request_ends_at_once_and_its_batch_mates_are_answered(
        self, drive: Drive
    ) -> None:
        model = drive(rows_max=2, delay_us_max=10)
        model.arrive("a", "b")
        model.cancel("a")
        assert model.ends == {"a": "Cancelled"}
        assert (model.scheduler.running_count, model.scheduler.is_idle) == (1, False)
        model.finish()
        assert model.ends == {"a": "Cancelled", "b": "answered"}

    def test_the_instance_stays_busy_when_everybody_in_the_batch_cancelled(
        self, drive: Drive
    ) -> None:
        model = drive()
        model.arrive("a", "b")
        model.cancel("a")
        assert model.batches == [["a"]]
        model.cancel("b")
        assert (model.scheduler.running_count, model.scheduler.is_idle) == (0, False)
        model.arrive("c")
        assert model.batches == [["a"]]
        model.finish()
        assert model.batches == [["a"], ["c"]]

    def test_the_unknown_and_the_ended_are_ignored(self, drive: Drive) -> None:
        model = drive()
        model.cancel("nobody")
        model.arrive("a")
        model.finish()
        model.cancel("a")
        assert model.ends == {"a": "answered"}

    def test_a_key_may_be_used_again_while_the_cancelled_run_goes_on(self, drive: Drive) -> None:
        model = drive(instances=2)
        model.arrive("a")
        model.cancel("a")
        model.arrive("a")
        model.finish()
        assert model.ends == {}, "the first run must not answer the second request"
        model.finish()
        assert model.ends == {"a": "answered"}


class TestStop:
    def test_a_graceful_stop_refuses_newcomers_and_finishes_the_rest(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", "a")
        model.stop()
        model.arrive("late")
        assert model.ends == {"late": "Unavailable"}
        assert model.texts["late"] == "stopped"
        model.finish_all()
        assert model.batches == [["busy"], ["a"]]
        assert model.scheduler.is_idle

    def test_nobody_waits_for_company_after_a_stop(self, drive: Drive) -> None:
        model = drive(rows_max=4, delay_us_max=100)
        model.arrive("a")
        assert model.batches == []
        model.stop()
        assert model.batches == [["a"]]

    def test_a_stop_at_once_ends_what_waits_but_not_what_runs(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", "a", "b")
        model.stop()
        model.stop(at_once=True)
        assert model.ends == {"a": "Unavailable", "b": "Unavailable"}
        assert not model.scheduler.is_idle
        model.finish()
        assert model.ends["busy"] == "answered"
        assert model.scheduler.is_idle

    def test_death_ends_everything(self, drive: Drive) -> None:
        model = drive(instances=2)
        model.arrive("running", "cancelled", "waiting")
        model.cancel("cancelled")
        model.die()
        model.arrive("late")
        assert model.ends == {
            "cancelled": "Cancelled",
            "running": "Unavailable",
            "waiting": "Unavailable",
            "late": "Unavailable",
        }
        assert model.scheduler.is_idle

    def test_a_run_that_outlives_the_death_answers_nobody(self, drive: Drive) -> None:
        model = drive()
        model.arrive("a", "b")
        model.die()
        model.finish()
        assert model.ends == {"a": "Unavailable", "b": "Unavailable"}
        assert model.batches == [["a"]]


def test_a_failed_run_still_owes_every_member_an_answer(drive: Drive) -> None:
    model = drive(rows_max=2)
    model.arrive("busy", "a", "b")
    model.finish()
    model.finish(run_us=None)
    assert model.ends == {"busy": "answered", "a": "answered", "b": "answered"}
    assert model.scheduler.is_idle


def test_counts_of_what_waits_and_runs(drive: Drive) -> None:
    model = drive(rows_max=2, instances=2)
    assert model.scheduler.is_idle
    model.arrive("a", "b", "c", "d", "e")
    assert (model.scheduler.queued_count, model.scheduler.running_count) == (3, 2)
    model.finish()
    assert (model.scheduler.queued_count, model.scheduler.running_count) == (1, 3)
    assert not model.scheduler.is_idle


def test_an_idle_scheduler_need_not_be_woken(drive: Drive) -> None:
    model = drive(rows_max=2)
    model.arrive("a", deadline_us=10)
    assert model.scheduler.wake_at_ns is None
    model.arrive("b")
    assert model.scheduler.wake_at_ns is None
    model.arrive("c", deadline_us=10)
    assert model.scheduler.wake_at_ns == 10_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"requests_max": 0}, "requests_max is 0, expected 1 or more"),
        ({"rows_max": -1}, "rows_max is -1"),
        ({"rows_max": 4, "preferred_rows": (2, 8)}, "preferred_rows is .*which is 4"),
        ({"preferred_rows": (1,)}, "preferred_rows is .*which is 0"),
        ({"delay_us_max": -1}, "delay_us_max is -1"),
        ({"timeout_us_default": -1}, "timeout_us_default is -1"),
        ({"timeout_action": "drop"}, "timeout_action is 'drop', expected one of .*'delay'"),
        ({"priority_levels": 10**6}, "priority_levels is 1000000, expected 0 to 1024"),
        ({"priority_levels": 2}, "default_priority is 0, expected 1 to .*which is 2"),
        ({"default_priority": 1}, "default_priority is 1, expected 0 without"),
        ({"overrides": {1: LevelPolicy(requests_max=1)}}, r"overrides is \[1\]"),
    ],
)
def test_an_impossible_policy_is_refused_when_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueuePolicy(**{"requests_max": 1, **values})
