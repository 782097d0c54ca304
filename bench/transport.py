# SPDX-License-Identifier: Apache-2.0
"""The lane: what calls between processes of one host cost, beside the floors under them."""

from collections.abc import Iterator

import numpy as np

from bench import models, real_models, servers, session_costs
from bench.flood import Flood, flood
from bench.lane_load import raw_windowed, timed, windowed
from bench.load import Job, LoadGenerator
from bench.measure import Contender, Series, Slice, difference, interleave, ratio
from bench.neighbours import Noise
from bench.options import Options
from bench.raw_echo import raw_echo
from bench.report import Table
from thirdrail import Client
from thirdrail.tensors import Array

QUESTION = "the lane: small and large calls, real models, opening sessions, handing tensors over"

SMALL_BYTES = 64
WINDOW = 16
SIZES_MIB = (1, 16)
NOISE_MIB = 16
FLOOD = 64
# A model with more than one instance never runs on the worker's loop.
THREADED, THREADED_CONFIG = "threaded", "instance_group { kind: KIND_CPU count: 2 }\n"
CALLER = "thirdrail.Client, blocking, one thread of this process"
COLUMNS = ("", "p50 us", "p99 us", "calls/s", "server CPU us/call", "client CPU us/call", "")


def run(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    models.write_identity(repository, THREADED, THREADED_CONFIG)
    with servers.thirdrail(repository, options.folder) as server:
        with Client(server.unix, transport="lane") as lane:
            yield _one(server, lane, options)
            yield _window(server, lane, options)
            for mib in SIZES_MIB:
                yield _in_place(server, lane, mib, options)
                yield _ordinary(server, lane, mib, options)
            yield _beside_noise(server, lane, options)
            yield _beside_flood(server, lane, options)
        yield from session_costs.run(server, options)
    yield from real_models.run(options)


def _one(server: servers.Server, lane: Client, options: Options) -> Table:
    inputs = {"x": models.floats(SMALL_BYTES)}
    with raw_echo() as sock, Client(server.unix, transport="grpc") as grpc_client:
        contenders = [
            _calls("lane, run on the worker's loop", server, lane, "identity", inputs),
            _calls("lane, run on an instance thread", server, lane, THREADED, inputs),
            _calls("the same client over gRPC, UDS", server, grpc_client, "identity", inputs),
            Contender("raw packet echo, two processes", raw_windowed(sock, bytes(SMALL_BYTES), 1)),
        ]
        series = interleave(contenders, options.seconds)
    floor = series[-1]
    return Table(
        f"identity {SMALL_BYTES} B, one at a time",
        f"{CALLER}; from arrays to arrays. Targets: p50 at most 110 us on the loop, 150 us through "
        "a thread. Last column: p50 above the raw echo's, by round.",
        COLUMNS,
        [_row(each, _above(each, floor)) for each in series],
    )


def _window(server: servers.Server, lane: Client, options: Options) -> Table:
    inputs = {"x": models.floats(SMALL_BYTES)}
    with raw_echo() as sock:
        contenders = [
            Contender("lane", windowed(lane, "identity", inputs, WINDOW), server.cpu_s),
            Contender("raw packet echo", raw_windowed(sock, bytes(SMALL_BYTES), WINDOW)),
        ]
        series = interleave(contenders, options.seconds)
    rate = ratio(series[0], series[1], lambda each: each.calls_per_s).text()
    return Table(
        f"identity {SMALL_BYTES} B, {WINDOW} in flight",
        f"{CALLER}, `submit`; a latency is from submit until the result was taken. Target: at "
        "least 40,000 calls/s. Last column: calls/s to the raw echo's.",
        COLUMNS,
        [_row(series[0], rate), _row(series[1], "")],
    )


def _in_place(server: servers.Server, lane: Client, mib: int, options: Options) -> Table:
    source = models.floats(mib << 20)
    warm = np.empty_like(source)
    x = lane.empty(source.shape, source.dtype)

    def call() -> None:
        with lane.infer("identity", {"x": x}, borrow=True) as result:
            assert result["y"].nbytes == source.nbytes

    def read() -> None:
        with lane.infer("identity", {"x": x}, borrow=True) as result:
            np.copyto(warm, result["y"])

    def copy() -> None:
        np.copyto(warm, source)

    contenders = [
        Contender("call: filled and read in place", timed(call), server.cpu_s),
        Contender("one memcpy of the size", timed(copy)),
        Contender("call, each after a memcpy", timed(call, copy), server.cpu_s),
        Contender("one memcpy, each after a call", timed(copy, call)),
        Contender("filling it: a memcpy into the arena", timed(lambda: np.copyto(x, source))),
        Contender("call, and reading it with a memcpy", timed(read), server.cpu_s),
    ]
    series = interleave(contenders, options.seconds)
    beside = {2: series[3]}
    return Table(
        f"identity {mib} MiB in place",
        f"{CALLER}, `empty` and `borrow=True`; the one copy is the engine's Identity. Target for "
        "16 MiB: p50 at most the memcpy's + 250 us. Last column: p50 above the memcpy's, by round; "
        "for the one that takes turns with memcpys, above theirs.",
        COLUMNS,
        [_row(each, _above(each, beside.get(i, series[1]))) for i, each in enumerate(series)],
    )


def _ordinary(server: servers.Server, lane: Client, mib: int, options: Options) -> Table:
    source = models.floats(mib << 20)
    warm = [np.empty_like(source) for _ in range(2)]

    def copies() -> None:
        np.copyto(warm[0], source)  # into the arena
        np.copyto(warm[1], warm[0])  # the engine's
        warm[1].copy()  # the result, in new memory

    def call() -> None:
        lane.infer("identity", {"x": source})

    contenders = [
        _calls("infer", server, lane, "identity", {"x": source}),
        Contender("the three memcpys it needs", timed(copies)),
        Contender("infer, each after such memcpys", timed(call, copies), server.cpu_s),
        Contender("the memcpys, each after an infer", timed(copies, call)),
    ]
    series = interleave(contenders, options.seconds)
    return Table(
        f"identity {mib} MiB with ordinary arrays",
        f"{CALLER}; a copy in, the engine's Identity, a copy out into new memory. Target: p50 at "
        "most the memcpys' + 200 us. Last column: p50 above theirs, by round.",
        COLUMNS,
        [
            _row(series[0], _above(series[0], series[1])),
            _row(series[1], ""),
            _row(series[2], _above(series[2], series[3])),
            _row(series[3], ""),
        ],
    )


def _beside_noise(server: servers.Server, lane: Client, options: Options) -> Table:
    inputs = {"x": models.floats(SMALL_BYTES)}
    large = models.request("identity", "x", models.floats(NOISE_MIB << 20))

    def call() -> None:
        lane.infer("identity", inputs)["y"]

    run_small = timed(call)
    with servers.echo("aio", options.folder) as echo, LoadGenerator() as load:
        same = Noise(load, Job(server.unix, large, 1))
        elsewhere = Noise(load, Job(echo.unix, large, 1))
        contenders = [
            Contender("alone", run_small),
            Contender("beside 16 MiB to this server", lambda s: same.beside(run_small, s)),
            Contender("beside 16 MiB to an echo server", lambda s: elsewhere.beside(run_small, s)),
        ]
        series = interleave(contenders, options.seconds)
    return Table(
        f"identity {SMALL_BYTES} B on a lane while another client sends {NOISE_MIB} MiB over gRPC",
        f"{CALLER}. Target: p99 at most 3 times the one alone. The echo server has nothing to do "
        "with ours: what the calls suffer beside it is the machine's doing. Last column: p99 to "
        "the one alone, by round.",
        COLUMNS,
        [_row(each, "" if each is series[0] else _p99_to(each, series[0])) for each in series],
    )


def _beside_flood(server: servers.Server, lane: Client, options: Options) -> Table:
    inputs = {"x": models.floats(SMALL_BYTES)}

    def call() -> None:
        lane.infer("identity", inputs)["y"]

    run_small = timed(call)

    def beside(source: Flood, seconds: float) -> Slice:
        with source.on():
            return run_small(seconds)

    folder = options.folder / "other"
    folder.mkdir()
    with (
        servers.thirdrail(options.folder / "models", folder) as other,
        flood(server.unix, FLOOD) as same,
        flood(other.unix, FLOOD) as elsewhere,
    ):
        contenders = [
            Contender("alone", run_small),
            Contender("beside a flood to this worker", lambda s: beside(same, s)),
            Contender("beside a flood to another server", lambda s: beside(elsewhere, s)),
        ]
        series = interleave(contenders, options.seconds)
    return Table(
        f"identity {SMALL_BYTES} B on a lane while another client keeps {FLOOD} calls in flight",
        f"{CALLER}. Target: p99 at most 3 times the one alone. The flood to another server takes "
        "the same share of the machine and none of our worker. Last column: p99 to the one alone, "
        "by round.",
        COLUMNS,
        [_row(each, "" if each is series[0] else _p99_to(each, series[0])) for each in series],
    )


def _calls(
    name: str, server: servers.Server, client: Client, model: str, inputs: dict[str, Array]
) -> Contender:
    def call() -> None:
        client.infer(model, inputs)["y"]

    return Contender(name, timed(call), server.cpu_s)


def _above(series: Series, floor: Series) -> str:
    return "" if series is floor else difference(series, floor, _p50).text(0)


def _p99_to(series: Series, alone: Series) -> str:
    return ratio(series, alone, lambda each: each.p99_us).text(1)


def _p50(turn: Slice) -> float:
    return turn.p50_us


def _row(series: Series, last: str) -> tuple[str, ...]:
    return (
        series.name,
        f"{series.percentile_us(50):.0f}",
        f"{series.percentile_us(99):.0f}",
        f"{series.calls_per_s:.0f}",
        " + ".join(f"{each:.0f}" for each in series.server_cpu_us),
        f"{series.client_cpu_us:.0f}",
        last,
    )
