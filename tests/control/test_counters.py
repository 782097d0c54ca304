# SPDX-License-Identifier: Apache-2.0
"""Counters never step back, whatever workers and reloads do to their sources."""

from hypothesis import given, settings
from hypothesis import strategies as st

from thirdrail.v1.metrics_pb2 import BatchCounters, ModelCounters
from thirdrail_server.front.control.counters import BATCH_SUMS, GAUGES, SUMS, CounterBook


def counters(name: str = "m", ok: int = 0, **fields: int) -> ModelCounters:
    return ModelCounters(name=name, version=1, requests_ok=ok, **fields)  # type: ignore[arg-type]


def test_a_restart_adds_to_what_was_counted() -> None:
    book = CounterBook()
    book.observe([counters(ok=5, queued=2, last_request_unix_ms=100)])
    book.restart()
    assert book.totals() == [counters(ok=5, last_request_unix_ms=100)]
    book.observe([counters(ok=1, queued=1, last_request_unix_ms=90)])
    assert book.totals() == [counters(ok=6, queued=1, last_request_unix_ms=100)]


def test_a_version_that_was_unloaded_keeps_its_counts_and_goes_on_from_them() -> None:
    book = CounterBook()
    book.observe([counters(ok=5), counters("other", ok=1)])
    book.observe([counters("other", ok=2)])
    book.observe([counters(ok=1), counters("other", ok=2)])
    assert [(total.name, total.requests_ok) for total in book.totals()] == [("m", 6), ("other", 2)]


def test_batch_sizes_are_added_by_rows() -> None:
    book = CounterBook()
    first = counters()
    first.batch_sizes.add(rows=4, batches=2, compute_ns=10)
    second = counters()
    second.batch_sizes.add(rows=4, batches=1, compute_ns=5)
    second.batch_sizes.add(rows=8, batches=1)
    book.observe([first])
    book.restart()
    book.observe([second])
    (total,) = book.totals()
    assert list(total.batch_sizes) == [
        BatchCounters(rows=4, batches=3, compute_ns=15),
        BatchCounters(rows=8, batches=1),
    ]


def test_every_number_field_is_a_sum_a_gauge_or_the_last_request() -> None:
    known = {*SUMS, *GAUGES, "name", "version", "last_request_unix_ms", "batch_sizes"}
    assert {field.name for field in ModelCounters.DESCRIPTOR.fields} == known
    assert {field.name for field in BatchCounters.DESCRIPTOR.fields} == {*BATCH_SUMS, "rows"}


numbers = st.integers(0, 1 << 40)
batches = st.builds(BatchCounters, rows=st.integers(1, 3), batches=numbers, compute_ns=numbers)
models = st.builds(
    ModelCounters,
    name=st.sampled_from("ab"),
    version=st.integers(1, 2),
    requests_ok=numbers,
    rows=numbers,
    last_request_unix_ms=numbers,
    queued=st.integers(0, 9),
    batch_sizes=st.lists(batches, max_size=3, unique_by=lambda each: each.rows),
)
looks = st.lists(models, max_size=4, unique_by=lambda each: (each.name, each.version))


@settings(max_examples=60, deadline=None)
@given(st.lists(looks | st.none(), max_size=8))
def test_totals_never_decrease(history: list[list[ModelCounters] | None]) -> None:
    book = CounterBook()
    before: dict[tuple[str, int], ModelCounters] = {}
    for look in history:
        if look is None:
            book.restart()
        else:
            book.observe(look)
        now = {(total.name, total.version): total for total in book.totals()}
        assert before.keys() <= now.keys()
        for key, total in before.items():
            for field in (*SUMS, "last_request_unix_ms"):
                assert getattr(now[key], field) >= getattr(total, field)
            sizes = {each.rows: each for each in now[key].batch_sizes}
            for each in total.batch_sizes:
                assert all(
                    getattr(sizes[each.rows], field) >= getattr(each, field) for field in BATCH_SUMS
                )
        before = now
