# SPDX-License-Identifier: Apache-2.0
"""Who goes first: priorities, turns between flows, deadlines within a flow."""

from typing import Any

import pytest

from thirdrail import errors
from thirdrail_server.worker.policy import QueuePolicy

Drive = Any  # the class that the fixture `drive` gives, see conftest.py


def order(model: Any) -> str:
    """Finish everything; the single-letter keys in the order in which they ran."""
    model.finish_all()
    return "".join(key for batch in model.batches for key in batch if len(key) == 1)


class TestPriorities:
    def test_a_lower_number_goes_first(self, drive: Drive) -> None:
        model = drive(priority_levels=3, default_priority=2)
        model.arrive("busy")
        model.arrive("c", priority=3)
        model.arrive("b")
        model.arrive("a", priority=1)
        assert order(model) == "abc"

    def test_lower_priorities_fill_the_batch_of_a_higher_one(self, drive: Drive) -> None:
        model = drive(rows_max=3, priority_levels=2, default_priority=2)
        model.arrive("busy")
        model.arrive("b", "c", "d")
        model.arrive("a", priority=1)
        model.finish_all()
        assert model.batches[1:] == [["a", "b", "c"], ["d"]]

    def test_zero_means_the_default(self) -> None:
        policy = QueuePolicy(requests_max=1, priority_levels=3, default_priority=2)
        assert [policy.resolve_priority(number) for number in range(4)] == [2, 1, 2, 3]

    @pytest.mark.parametrize("priority", [-1, 4, 2**64 - 1])
    def test_a_priority_that_the_model_does_not_have_is_the_callers_mistake(
        self, priority: int
    ) -> None:
        policy = QueuePolicy(requests_max=1, priority_levels=3, default_priority=2)
        with pytest.raises(errors.InvalidArgument, match=rf"{priority}, expected 1 .* to 3, or 0"):
            policy.resolve_priority(priority)

    def test_without_priorities_all_requests_are_equal(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy")
        model.arrive("a", priority=7)
        model.arrive("b", priority=1)
        assert order(model) == "ab"


class TestTurns:
    def test_flows_alternate_however_much_each_has_waiting(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", flow="other")
        model.arrive("a", "b", "c", "d", flow=1)
        model.arrive("A", "B", flow=2)
        assert order(model) == "aAbBcd"

    def test_turns_go_on_from_one_batch_to_the_next(self, drive: Drive) -> None:
        model = drive(rows_max=3)
        model.arrive("busy", flow="other")
        model.arrive("a", "b", "c", flow=1)
        model.arrive("A", "B", "C", flow=2)
        model.finish_all()
        assert model.batches[1:] == [["a", "A", "b"], ["B", "c", "C"]]

    def test_a_flow_that_comes_back_goes_to_the_end_of_the_line(self, drive: Drive) -> None:
        model = drive()
        model.arrive("a", flow=1)
        model.arrive("A", "B", flow=2)
        model.arrive("x", flow=3)
        model.arrive("b", flow=1)
        assert order(model) == "aAxbB"

    def test_a_cancelled_request_uses_up_no_turn(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", flow="other")
        model.arrive("a", "b", flow=1)
        model.arrive("A", flow=2)
        model.cancel("a")
        assert order(model) == "bA"

    def test_a_flow_whose_first_request_is_passed_over_keeps_its_turn(self, drive: Drive) -> None:
        model = drive(rows_max=2)
        model.arrive("busy", flow="other")
        model.arrive("a", flow=1)
        model.arrive("X", flow=2, rows=2)
        model.arrive("Y", flow=2)
        model.arrive("x", flow=3)
        model.finish_all()
        assert model.batches[1:] == [["a", "x"], ["X"], ["Y"]]

    def test_a_flow_keeps_its_turn_even_if_another_request_of_it_was_taken(
        self, drive: Drive
    ) -> None:
        model = drive(rows_max=2)
        model.arrive("busy", flow="other")
        model.arrive("a", flow=1)
        model.arrive("X", flow=2, rows=2)
        model.arrive("Y", flow=2)
        model.arrive("b", flow=1, rows=2)
        model.finish_all()
        assert model.batches[1:] == [["a", "Y"], ["X"], ["b"]]

    def test_priorities_come_before_turns(self, drive: Drive) -> None:
        model = drive(priority_levels=2, default_priority=2)
        model.arrive("busy", flow="other")
        model.arrive("A", flow=2)
        model.arrive("a", "b", flow=1, priority=1)
        assert order(model) == "abA"


class TestDeadlinesWithinAFlow:
    def test_the_nearest_goes_first_then_the_earliest_arrival(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy")
        model.arrive("d")
        model.arrive("c", deadline_us=900)
        model.arrive("a", deadline_us=500)
        model.arrive("b", deadline_us=500)
        model.arrive("e")
        assert order(model) == "abcde"

    def test_a_near_deadline_does_not_take_another_flows_turn(self, drive: Drive) -> None:
        model = drive()
        model.arrive("busy", flow="other")
        model.arrive("a", "c", flow=1)
        model.arrive("b", "d", flow=2, deadline_us=500)
        assert order(model) == "abcd"
