# SPDX-License-Identifier: Apache-2.0
"""What a small call costs: a 64-byte identity beside bare gRPC echo servers in Python."""

import contextlib
from collections.abc import Iterator, Sequence

from bench import models, servers
from bench.load import Job, LoadGenerator
from bench.measure import Contender, Series, Slice, difference, interleave, ratio
from bench.options import Options
from bench.report import Table

QUESTION = "64 B identity: latency, throughput and CPU beside bare gRPC echo servers"

SIZE_BYTES = 64
IN_FLIGHT = (1, 16)
MODES = {"unary": 0, "stream": 1}  # streams
TRANSPORTS = ("TCP", "UDS")
COLUMNS = (
    "server",
    "p50 us",
    "p99 us",
    "calls/s",
    "server CPU us/call",
    "client CPU us/call",
    "p50 over aio echo, us",
    "calls/s to aio echo",
)
INCLUDES = (
    "Client: the generated synchronous stub in a process of its own; it parses and builds its "
    "messages. Spread: lowest to highest round. Thirdrail's CPU: front + worker."
)


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    request = models.request("identity", "x", models.floats(SIZE_BYTES))
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(servers.thirdrail(repository, options.folder)),
            stack.enter_context(servers.echo("aio", options.folder)),
            stack.enter_context(servers.echo("sync", options.folder)),
        ]
        load = stack.enter_context(LoadGenerator())
        for mode, streams in MODES.items():
            for in_flight in IN_FLIGHT:
                for transport in TRANSPORTS:
                    contenders = [
                        contender(
                            load,
                            server,
                            Job(server.address(transport), request, in_flight, streams),
                        )
                        for server in running
                    ]
                    title = f"identity 64 B, {mode}, {in_flight} in flight, {transport}"
                    yield table(title, interleave(contenders, options.seconds))


def contender(load: LoadGenerator, server: servers.Server, job: Job) -> Contender:
    def run_slice(seconds: float) -> Slice:
        return load.run(job, seconds)

    return Contender(server.name, run_slice, server.cpu_s)


def table(title: str, series: Sequence[Series]) -> Table:
    """The second one is what the others are compared with."""
    rows = [_row(each, series[1]) for each in series]
    return Table(title, INCLUDES, COLUMNS, rows)


def _row(series: Series, baseline: Series) -> tuple[str, ...]:
    added = difference(series, baseline, lambda each: each.p50_us).text(0)
    rate = ratio(series, baseline, lambda each: each.calls_per_s).text()
    return (
        series.name,
        f"{series.percentile_us(50):.0f}",
        f"{series.percentile_us(99):.0f}",
        f"{series.calls_per_s:.0f}",
        " + ".join(f"{each:.0f}" for each in series.server_cpu_us),
        f"{series.client_cpu_us:.0f}",
        "" if series is baseline else added,
        "" if series is baseline else rate,
    )
