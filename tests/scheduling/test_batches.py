# SPDX-License-Identifier: Apache-2.0
"""When batches start and who is in them. Times are in microseconds."""

from typing import Any

from thirdrail_server.worker.queue import PASSED_OVER_MAX

Drive = Any  # the class that the fixture `drive` gives, see conftest.py


def test_a_request_starts_at_once_on_a_free_instance(drive: Drive) -> None:
    model = drive()
    model.arrive("a")
    assert model.batches == [["a"]]
    model.finish()
    assert model.ends == {"a": "answered"}


def test_as_many_batches_run_at_once_as_there_are_instances(drive: Drive) -> None:
    model = drive(instances=2)
    model.arrive("a", "b", "c")
    assert model.batches == [["a"], ["b"]]
    model.finish()
    assert model.batches == [["a"], ["b"], ["c"]]


def test_a_model_that_does_not_batch_runs_each_request_alone(drive: Drive) -> None:
    model = drive(rows_max=0)
    model.arrive("a", "b", "c")
    model.finish_all()
    assert model.batches == [["a"], ["b"], ["c"]]


def test_what_waited_while_all_instances_were_busy_runs_together(drive: Drive) -> None:
    model = drive(rows_max=3)
    model.arrive("a", "b", "c", "d", "e")
    model.finish_all()
    assert model.batches == [["a"], ["b", "c", "d"], ["e"]]


def test_the_bound_counts_rows_not_requests(drive: Drive) -> None:
    model = drive(rows_max=4)
    model.arrive("a", "b", "c", "d", rows=2)
    model.finish_all()
    assert model.batches == [["a"], ["b", "c"], ["d"]]


def test_different_signatures_never_share_a_batch(drive: Drive) -> None:
    model = drive(rows_max=8)
    model.arrive("busy")
    for key, signature in (("a", "wide"), ("b", "narrow"), ("c", "wide"), ("d", "narrow")):
        model.arrive(key, signature=signature)
    model.finish_all()
    assert model.batches == [["busy"], ["a", "c"], ["b", "d"]]


def test_a_request_that_does_not_fit_is_passed_over_and_leads_the_next_batch(drive: Drive) -> None:
    model = drive(rows_max=4)
    model.arrive("busy")
    model.arrive("a", rows=2)
    model.arrive("big", rows=3)
    model.arrive("b", rows=2)
    model.arrive("c", rows=1)
    model.finish_all()
    assert model.batches == [["busy"], ["a", "b"], ["big", "c"]]


def test_a_steady_stream_of_small_requests_does_not_starve_a_big_one(drive: Drive) -> None:
    model = drive(rows_max=4)
    model.arrive("busy", flow="small")
    model.arrive("a", flow="small")
    model.arrive("big", flow="big", rows=4)
    for number in range(8):
        model.arrive(f"small {number}", flow="small")
    model.finish()
    model.arrive("late", flow="small")
    model.finish()
    assert model.batches[2] == ["big"]


def test_the_search_for_small_requests_is_bounded(drive: Drive) -> None:
    model = drive(rows_max=4)
    model.arrive("busy")
    model.arrive("a", rows=2)
    model.arrive(*range(PASSED_OVER_MAX), rows=3)
    model.arrive("near", rows=1)
    model.finish()
    assert model.batches[-1] == ["a", "near"]

    model = drive(rows_max=4)
    model.arrive("busy")
    model.arrive("a", rows=2)
    model.arrive(*range(PASSED_OVER_MAX + 1), rows=3)
    model.arrive("far", rows=1)
    model.finish()
    assert model.batches[-1] == ["a"]


class TestDelay:
    """With `delay_us_max` a request waits for company although an instance is free."""

    def test_a_full_batch_starts_at_once(self, drive: Drive) -> None:
        model = drive(rows_max=3, delay_us_max=100)
        model.arrive("a", "b")
        assert model.batches == []
        model.arrive("c")
        assert model.batches == [["a", "b", "c"]]

    def test_after_the_delay_the_batch_starts_with_what_there_is(self, drive: Drive) -> None:
        model = drive(rows_max=3, delay_us_max=100)
        model.arrive("a")
        model.wait(60)
        model.arrive("b")
        model.wait(39)
        assert model.batches == []
        model.wait(1)
        assert model.batches == [["a", "b"]]

    def test_time_spent_waiting_for_an_instance_counts(self, drive: Drive) -> None:
        model = drive(rows_max=2, delay_us_max=100)
        model.arrive("busy 1", "busy 2")
        model.arrive("a")
        model.wait(100)
        model.finish()
        assert model.batches[1:] == [["a"]]

    def test_the_batch_starts_when_the_next_request_would_not_fit(self, drive: Drive) -> None:
        model = drive(rows_max=4, delay_us_max=100)
        model.arrive("a", rows=3)
        model.arrive("b", rows=2)
        assert model.batches == [["a"]]

    def test_a_full_group_does_not_wait_behind_one_that_is_not(self, drive: Drive) -> None:
        model = drive(rows_max=2, delay_us_max=100)
        model.arrive("a", signature="wide")
        model.arrive("b", "c", signature="narrow")
        assert model.batches == [["b", "c"]]

    def test_a_request_more_urgent_than_the_default_does_not_wait(self, drive: Drive) -> None:
        model = drive(rows_max=8, delay_us_max=100, priority_levels=3, default_priority=2)
        model.arrive("default")
        model.arrive("low", priority=3)
        assert model.batches == []
        model.arrive("urgent", priority=1)
        assert model.batches == [["urgent", "default", "low"]]

    def test_a_batch_closes_early_for_a_member_that_would_miss_its_deadline(
        self, drive: Drive
    ) -> None:
        model = drive(rows_max=2, delay_us_max=50_000)
        model.arrive("busy 1", "busy 2")
        model.finish(run_us=3_000)
        model.arrive("a", deadline_us=10_000)
        model.wait(5_999)
        assert model.batches[1:] == []
        model.wait(1)  # 10 ms, less a run of 3 ms, less 1 ms of slack
        assert model.batches[1:] == [["a"]]

    def test_the_estimated_run_follows_longer_runs_faster_than_shorter_ones(
        self, drive: Drive
    ) -> None:
        def start_us(*runs_us: int) -> int:
            model = drive(rows_max=2, delay_us_max=100_000)
            for run_us in runs_us:
                model.arrive("busy 1", "busy 2")
                model.finish(run_us=run_us)
            model.arrive("a", deadline_us=20_000)
            model.wait(100_000)
            return int(model.started_us["a"])

        assert start_us(8_000) == 20_000 - 1_000 - 8_000
        assert start_us(4_000, 8_000) == 20_000 - 1_000 - 6_000
        assert start_us(8_000, 4_000) == 20_000 - 1_000 - 7_500


class TestPreferredSizes:
    def test_the_largest_preferred_size_is_taken_and_the_rest_stays(self, drive: Drive) -> None:
        model = drive(rows_max=8, preferred_rows=(2, 4))
        model.arrive("busy")
        model.arrive("a", "b", "c", "d", "e", "f", "g")
        model.finish_all()
        assert model.batches[1:] == [["a", "b", "c", "d"], ["e", "f"], ["g"]]

    def test_a_preferred_size_does_not_wait_for_a_larger_one(self, drive: Drive) -> None:
        model = drive(rows_max=8, preferred_rows=(2, 4), delay_us_max=100)
        model.arrive("a")
        assert model.batches == []
        model.arrive("b")
        assert model.batches == [["a", "b"]]

    def test_between_two_preferred_sizes_the_batch_waits(self, drive: Drive) -> None:
        model = drive(rows_max=8, preferred_rows=(2, 6), delay_us_max=100)
        model.arrive("a", rows=3)
        assert model.batches == []
        model.arrive("b", rows=3)
        assert model.batches == [["a", "b"]]

    def test_after_the_delay_any_size_will_do_up_to_the_largest_possible(
        self, drive: Drive
    ) -> None:
        model = drive(rows_max=8, preferred_rows=(4,), delay_us_max=100)
        model.arrive("busy", rows=4)
        model.arrive("a", "b", "c", "d", "e", "f")
        model.wait(100)
        model.finish()
        assert model.batches[1:] == [["a", "b", "c", "d", "e", "f"]]

    def test_a_request_larger_than_every_preferred_size_starts(self, drive: Drive) -> None:
        model = drive(rows_max=8, preferred_rows=(4,), delay_us_max=100)
        model.arrive("big", rows=6)
        assert model.batches == [["big"]]

    def test_the_batch_starts_when_the_next_would_exceed_every_preferred_size(
        self, drive: Drive
    ) -> None:
        model = drive(rows_max=8, preferred_rows=(4,), delay_us_max=100)
        model.arrive("a", "b", rows=3)
        assert model.batches == [["a"]]

    def test_a_cancel_can_complete_a_preferred_size(self, drive: Drive) -> None:
        model = drive(rows_max=8, preferred_rows=(4, 8), delay_us_max=100)
        model.arrive("a", rows=1)
        model.arrive("b", rows=4)
        assert model.batches == []
        model.cancel("a")
        assert model.batches == [["b"]]
