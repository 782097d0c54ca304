# SPDX-License-Identifier: Apache-2.0
"""What a client that sends 16 MiB messages does to the small calls of others on the same worker.

Large messages keep cores busy wherever they go. So the small calls are also measured beside the
same messages to an echo server that has nothing to do with their worker: what they suffer there is
the machine's doing, and only what they suffer beyond it is the server's.
"""

import statistics
import time
from collections.abc import Callable, Iterator

from bench import models, servers
from bench.lane_processes import worker_with_two_lanes
from bench.load import Job, LoadGenerator
from bench.measure import Contender, Series, Slice, interleave, ratio
from bench.options import Options
from bench.report import Table

QUESTION = "small calls of others while a client sends 16 MiB messages"

LARGE_MIB = 16
SMALL_BYTES = 64
LEAD_S = 0.2  # the large messages start so long before the small calls, and end as late
COLUMNS = ("small calls", "p50 us", "p99 us", "p99.9 us", "calls/s", "large messages/s")


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    small = models.request("identity", "x", models.floats(SMALL_BYTES))
    large = models.request("identity", "x", models.floats(LARGE_MIB << 20))
    with (
        servers.echo("aio", options.folder) as echo,
        worker_with_two_lanes(repository, options.folder, small) as lanes,
        LoadGenerator() as load,
    ):
        yield _measure(
            "a direct lane caller beside a front that receives 16 MiB messages",
            f"64 B calls, 1 in flight, on a lane of its own (thirdrail.lane, asyncio). The "
            f"{LARGE_MIB} MiB messages go through a front in another process to the same worker.",
            lanes.caller.run,
            Noise(load, Job(lanes.address, large, 1)),
            Noise(load, Job(echo.unix, large, 1)),
            options,
        )
    with (
        servers.echo("aio", options.folder) as echo,
        servers.thirdrail(repository, options.folder) as server,
        LoadGenerator() as load,
        LoadGenerator() as other_load,
    ):
        job = Job(server.unix, small, 1)
        yield _measure(
            "gRPC calls through the same front",
            "64 B unary calls, 1 in flight, UDS, generated synchronous stub in a process of its "
            "own. gRPC shares the front's one event loop: reported without a target.",
            lambda seconds: load.run(job, seconds),
            Noise(other_load, Job(server.unix, large, 1)),
            Noise(other_load, Job(echo.unix, large, 1)),
            options,
        )


class Noise:
    """Large messages beside whatever is measured."""

    def __init__(self, load: LoadGenerator, job: Job) -> None:
        self._load = load
        self._job = job
        self._per_s: list[float] = []

    def beside(self, run: Callable[[float], Slice], seconds: float) -> Slice:
        self._load.start(self._job, seconds + 2 * LEAD_S)
        time.sleep(LEAD_S)
        done = run(seconds)
        self._per_s.append(self._load.result().calls_per_s)
        return done

    def rate_text(self) -> str:
        return f"{statistics.mean(self._per_s):.1f}"


def _measure(
    title: str,
    includes: str,
    run_small: Callable[[float], Slice],
    same: Noise,
    elsewhere: Noise,
    options: Options,
) -> Table:
    contenders = [
        Contender("alone", run_small),
        Contender("beside large messages", lambda seconds: same.beside(run_small, seconds)),
        Contender("beside an echo server's", lambda seconds: elsewhere.beside(run_small, seconds)),
    ]
    series = interleave(contenders, options.seconds)
    alone, beside, control = series
    rates = ("", same.rate_text(), elsewhere.rate_text())
    return Table(
        title,
        includes,
        COLUMNS,
        [_row(each, rate) for each, rate in zip(series, rates, strict=True)],
        [_ratios(beside, alone, "alone"), _ratios(beside, control, "beside an echo server's")],
    )


def _ratios(of: Series, to: Series, what: str) -> str:
    p99 = ratio(of, to, lambda each: each.p99_us)
    p50 = ratio(of, to, lambda each: each.p50_us)
    together = of.percentile_us(99) / to.percentile_us(99)
    return (
        f"to {what}: p99 {p99.text(1)} by round, {together:.1f} over all calls; p50 {p50.text(1)}"
    )


def _row(series: Series, large_per_s: str) -> tuple[str, ...]:
    return (
        series.name,
        f"{series.percentile_us(50):.0f}",
        f"{series.percentile_us(99):.0f}",
        f"{series.percentile_us(99.9):.0f}",
        f"{series.calls_per_s:.0f}",
        large_per_s,
    )
