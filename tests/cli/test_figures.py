# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `thirdrail top`, and how its screen looks on a terminal."""

import io

from rich.console import Console

from thirdrail.cli.figures import Figures, figures_between
from thirdrail.cli.top import view
from thirdrail.v1.metrics_pb2 import ModelCounters, SnapshotResponse, WorkerStatus

MS = 1_000_000


def snapshot(seconds: float, **counters: int) -> SnapshotResponse:
    model = ModelCounters(name="m", version=1, **counters)  # type: ignore[arg-type]
    worker = WorkerStatus(name="cpu", pid=7, is_serving=True, resident_bytes=3 << 20)
    return SnapshotResponse(
        uptime_ns=round(seconds * 1e9), server_version="1.2", models=[model], workers=[worker]
    )


EARLY = snapshot(10, requests_ok=100, rows=100, batches=50, total_ns=900 * MS)
LATE = snapshot(
    12,
    requests_ok=140,
    rows=180,
    batches=70,
    total_ns=980 * MS,
    queue_ns=20 * MS,
    compute_ns=10 * MS,
    requests_failed=1,
    requests_refused=2,
    requests_timed_out=3,
    requests_cancelled=4,
    queued=5,
    running=2,
)


def test_rates_and_means_are_those_of_the_interval() -> None:
    figures = figures_between(EARLY, LATE)
    [m] = figures.models
    assert (figures.interval_s, figures.uptime_s) == (2.0, 12.0)
    assert (m.requests_per_s, m.rows_per_s, m.not_ok_per_s) == (20.0, 40.0, 5.0)
    assert (m.batch_rows_mean, m.latency_ms_mean) == (4.0, 2.0)
    assert (m.queue_ms_mean, m.compute_ms_mean) == (0.5, 0.5)
    assert (m.queued, m.running) == (5, 2)


def test_nothing_happened() -> None:
    [m] = figures_between(EARLY, snapshot(11, requests_ok=100, rows=100, batches=50)).models
    assert (m.requests_per_s, m.batch_rows_mean, m.latency_ms_mean) == (0.0, None, None)


def test_a_restarted_server_counts_from_zero() -> None:
    [m] = figures_between(LATE, snapshot(2, requests_ok=10, total_ns=10 * MS)).models
    assert (m.requests_per_s, m.latency_ms_mean) == (5.0, 1.0)


def test_a_new_model_counts_from_zero() -> None:
    before = SnapshotResponse(uptime_ns=EARLY.uptime_ns)
    assert figures_between(before, LATE).models[0].requests_per_s == 70.0


def screen(figures: Figures, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None).print(view(figures))
    return file.getvalue().splitlines()


def test_a_narrow_terminal_breaks_no_number_and_no_heading() -> None:
    busy = snapshot(14, requests_ok=99_999_999, rows=99_999_999, batches=9_999)
    busy.models[0].name = "a_model_with_a_long_name"
    lines = screen(figures_between(EARLY, busy), 72)
    [heading] = [line for line in lines if line.startswith("MODEL")]
    shown = " ".join(heading.split())
    assert shown == "MODEL VER REQ/S ROWS/S BAD/S BATCH LATENCY QUEUE COMPUTE WAIT RUN"
    assert any({"25000000", "10001.0"} <= set(line.split()) for line in lines)


def test_the_screen() -> None:
    lines = [line.split() for line in screen(figures_between(EARLY, LATE), 120)]
    assert lines[0] == ["thirdrail", "1.2,", "up", "0:00:12"]
    assert ["m", "1", "20.0", "40.0", "5.0", "4.0", "2.00", "0.50", "0.50", "5", "2"] in lines
    assert ["cpu", "serving", "7", "0", "3", "MiB", "0", "0", "MiB"] in lines
