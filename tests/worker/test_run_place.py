# SPDX-License-Identifier: Apache-2.0
"""Where the next run of a model belongs, by what its earlier ones took."""

from thirdrail_server.worker.run_place import (
    INLINE_INPUT_BYTES_MAX,
    ROUND_RUNS,
    ROUNDS_MAX,
    RunHistory,
    RunPlace,
)

SHORT_NS, LONG_NS = 100, 101
LEARNS = RunPlace(on_loop=False, learns=True, run_ns_max=SHORT_NS, overrun_ns_max=1000)


def run_on_threads(history: RunHistory, runs: int, run_ns: int, size: int = 8) -> None:
    for _ in range(runs):
        history.ran_on_thread(size, run_ns)


def test_a_model_comes_to_the_loop_after_a_round_of_short_runs() -> None:
    history = RunHistory(LEARNS)
    run_on_threads(history, ROUND_RUNS - 1, SHORT_NS)
    assert not history.is_for_loop(8)
    run_on_threads(history, 1, SHORT_NS)
    assert history.is_for_loop(8)
    assert not history.is_for_loop(9), "nobody knows what larger ones take"


def test_one_that_does_not_learn_stays_where_it_is() -> None:
    history = RunHistory(RunPlace(on_loop=False, run_ns_max=SHORT_NS))
    run_on_threads(history, 10 * ROUND_RUNS, SHORT_NS)
    assert not history.is_for_loop(0)


def test_the_median_of_a_round_says_whether_runs_are_short() -> None:
    """A thread that waits for a core takes long for a short run as well."""
    history = RunHistory(LEARNS)
    run_on_threads(history, ROUND_RUNS // 2, LONG_NS)
    run_on_threads(history, ROUND_RUNS // 2, SHORT_NS)
    assert not history.is_for_loop(8)
    run_on_threads(history, ROUND_RUNS // 2 - 1, 50 * LONG_NS)
    run_on_threads(history, ROUND_RUNS // 2 + 1, SHORT_NS)
    assert history.is_for_loop(8)


def test_only_sizes_that_were_short_come_to_the_loop() -> None:
    history = RunHistory(LEARNS)
    run_on_threads(history, ROUND_RUNS // 4, LONG_NS, size=4096)
    run_on_threads(history, ROUND_RUNS // 2, SHORT_NS, size=64)
    run_on_threads(history, ROUND_RUNS // 4, SHORT_NS, size=512)
    assert history.is_for_loop(512)
    assert not history.is_for_loop(513)


def test_larger_ones_follow_when_they_were_short_on_threads() -> None:
    history = RunHistory(LEARNS)
    run_on_threads(history, ROUND_RUNS, SHORT_NS, size=64)
    history.ran_on_thread(1000, SHORT_NS // 2)
    assert history.is_for_loop(2000)
    assert not history.is_for_loop(2001)
    history.ran_on_thread(2001, LONG_NS)
    assert not history.is_for_loop(2001)
    assert history.is_for_loop(64)


def test_after_leaving_it_takes_twice_as_many_short_runs_each_time() -> None:
    history = RunHistory(LEARNS)
    for rounds in (1, 2, 4):
        run_on_threads(history, rounds * ROUND_RUNS - 1, SHORT_NS)
        assert not history.is_for_loop(8)
        run_on_threads(history, 1, SHORT_NS)
        assert history.is_for_loop(8)
        history.leave_loop()


def test_a_long_round_between_counts_from_the_beginning() -> None:
    history = RunHistory(LEARNS)
    history.leave_loop()  # two rounds from here on
    for run_ns in (SHORT_NS, LONG_NS, SHORT_NS):
        run_on_threads(history, ROUND_RUNS, run_ns)
    assert not history.is_for_loop(8)
    run_on_threads(history, ROUND_RUNS, SHORT_NS)
    assert history.is_for_loop(8)


def test_the_way_back_has_an_end() -> None:
    history = RunHistory(LEARNS)
    for _ in range(100):
        history.leave_loop()
    run_on_threads(history, ROUNDS_MAX * ROUND_RUNS, SHORT_NS)
    assert history.is_for_loop(8)


def test_who_was_put_on_the_loop_by_trials_can_come_back() -> None:
    place = RunPlace(on_loop=True, learns=True, run_ns_max=SHORT_NS, overrun_ns_max=1000)
    history = RunHistory(place)
    assert history.is_for_loop(INLINE_INPUT_BYTES_MAX)
    history.ran_on_loop(8, 1001)
    assert history.is_suspect
    history.leave_loop()
    assert not history.is_for_loop(0)
    run_on_threads(history, 2 * ROUND_RUNS, SHORT_NS)
    assert history.is_for_loop(8)
    assert not history.is_for_loop(INLINE_INPUT_BYTES_MAX), "its callers said nothing of those"


def test_a_run_within_the_second_bound_makes_nobody_suspect() -> None:
    history = RunHistory(LEARNS)
    run_on_threads(history, ROUND_RUNS, SHORT_NS)
    history.ran_on_loop(8, 1000)
    assert not history.is_suspect
