# SPDX-License-Identifier: Apache-2.0
"""When a dead worker is started again, and whose fault its death was; time is a number here."""

from hypothesis import given
from hypothesis import strategies as st

from thirdrail_server.front.control.restarts import MS, LoadLedger, RestartDelay, S, Verdict


def test_deaths_in_a_row_double_the_delay_up_to_its_bound() -> None:
    delay = RestartDelay(delay_ms_min=100, delay_ms_max=1000, stable_s=60)
    waited = []
    for now_s in range(6):
        delay.on_start(now_s * S)
        waited.append(delay.on_death(now_s * S + 1) // MS)
    assert waited == [100, 200, 400, 800, 1000, 1000]


def test_a_long_life_forgets_the_deaths_before_it() -> None:
    delay = RestartDelay(delay_ms_min=100, delay_ms_max=1000, stable_s=60)
    for _ in range(3):
        delay.on_start(0)
        delay.on_death(1)
    delay.on_start(0)
    assert delay.on_death(60 * S - 1) // MS == 800
    delay.on_start(0)
    assert delay.on_death(60 * S) // MS == 100


def test_a_worker_that_never_comes_up_is_not_stable() -> None:
    delay = RestartDelay(delay_ms_min=100, delay_ms_max=1000, stable_s=60)
    assert [delay.on_death(hour * 3600 * S) // MS for hour in range(3)] == [100, 200, 400]


@given(st.lists(st.integers(0, 120), max_size=40))
def test_the_delay_stays_within_its_bounds(lives_s: list[int]) -> None:
    delay = RestartDelay(delay_ms_min=3, delay_ms_max=700, stable_s=60)
    for life_s in lives_s:
        delay.on_start(0)
        assert 3 * MS <= delay.on_death(life_s * S) <= 700 * MS


def test_what_served_comes_back_in_the_order_of_its_loads() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    for name in ("c", "a", "b", "gone"):
        ledger.begin(name)
        assert ledger.succeed(name, f"source of {name}") is None
    assert ledger.forget("gone") == "source of gone"
    aftermath = ledger.on_death()
    assert aftermath.lost == [(name, f"source of {name}") for name in ("c", "a", "b")]
    assert not aftermath.retried
    assert ledger.on_death().lost == []


def test_one_suspect_is_the_culprit_and_does_not_come_back() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    for name in ("poison", "good"):
        ledger.begin(name)
        ledger.succeed(name, "old")
    ledger.begin("poison")
    aftermath = ledger.on_death()
    assert aftermath.lost == [("good", "old")]
    assert not aftermath.retried
    assert ledger.verdict("poison") is Verdict.BROKEN


def test_several_suspects_are_tried_again_one_by_one() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    ledger.begin("poison")
    ledger.begin("innocent")
    assert ledger.on_death().retried == {"poison", "innocent"}
    assert ledger.verdict("innocent") is Verdict.RETRY_ALONE
    assert ledger.verdict("poison") is Verdict.RETRY_ALONE
    ledger.begin("poison")
    ledger.on_death()
    assert ledger.verdict("poison") is Verdict.BROKEN


def test_a_failed_load_is_no_suspect() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    ledger.begin("bad")
    ledger.fail("bad")
    ledger.begin("poison")
    ledger.on_death()
    assert ledger.verdict("poison") is Verdict.BROKEN


def test_who_waits_for_a_build_is_no_suspect() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    ledger.begin("built")
    ledger.begin("poison")
    ledger.note("built", is_building=True)
    assert ledger.on_death().retried == {"built"}
    assert ledger.verdict("built") is Verdict.RETRY
    assert ledger.verdict("poison") is Verdict.BROKEN


def test_a_build_that_is_done_makes_its_load_a_suspect_again() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    ledger.begin("built")
    ledger.note("built", is_building=True)
    ledger.note("built", is_building=False)
    assert ledger.on_death().retried == frozenset()
    assert ledger.verdict("built") is Verdict.BROKEN
    ledger.note("unknown", is_building=True)
    assert ledger.on_death().retried == frozenset()


def test_a_model_that_served_while_it_was_built_is_left_to_who_builds_it() -> None:
    ledger: LoadLedger[str] = LoadLedger()
    ledger.begin("m")
    ledger.succeed("m", "source")
    ledger.begin("m")
    ledger.note("m", is_building=True)
    aftermath = ledger.on_death()
    assert not aftermath.lost
    assert aftermath.retried == {"m"}
