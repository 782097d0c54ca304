# SPDX-License-Identifier: Apache-2.0
"""What sessions cost: to open, to keep, and to hand a tensor from one to another."""

import time
from collections.abc import Iterator

import numpy as np
import psutil

from bench import models, servers
from bench.lane_load import timed
from bench.measure import Contender, difference, interleave
from bench.options import Options
from bench.report import Table
from thirdrail import Client

IDLE_SESSIONS = 50
HAND_OVER_MIB = 16
SETTLE_S = 0.5
MIB = 1 << 20


def run(server: servers.Server, options: Options) -> Iterator[Table]:
    yield _opening(server, options)
    yield _idle(server)
    yield _hand_over(server, options)


def _opening(server: servers.Server, options: Options) -> Table:
    inputs = {"x": models.floats(64)}
    opened: list[Client] = []

    def first_call(transport: str) -> None:
        client = Client(server.unix, transport="lane" if transport == "lane" else "grpc")
        opened.append(client)
        client.infer("identity", inputs)["y"]

    def tidy() -> None:
        opened.pop().close()

    contenders = [
        Contender("session opened, first call made", timed(lambda: first_call("lane"), tidy)),
        Contender("the same over gRPC alone", timed(lambda: first_call("grpc"), tidy)),
    ]
    series = interleave(contenders, options.seconds)
    added = difference(series[0], series[1], lambda each: each.p50_us).text(0)
    rows = [
        (each.name, f"{each.percentile_us(50):.0f}", f"{each.percentile_us(99):.0f}")
        for each in series
    ]
    return Table(
        "opening a session",
        "A new Client: gRPC connection, OpenSession, lane, first 64 B identity. Target: p50 at "
        "most 5 ms. Closing is not timed.",
        ("", "p50 us", "p99 us"),
        rows,
        [f"the session adds {added} us to gRPC's own connection"],
    )


def _idle(server: servers.Server) -> Table:
    worker = server.processes[1]
    clients = [Client(server.unix, transport="lane") for _ in range(IDLE_SESSIONS)]
    inputs = {"x": models.floats(64)}
    clients[0].infer("identity", inputs)
    before = _used(worker)
    for client in clients[1:]:
        client.infer("identity", inputs)
    time.sleep(SETTLE_S)
    each = (_used(worker) - before) / (IDLE_SESSIONS - 1)
    for client in clients:
        client.close()
    return Table(
        "an idle session",
        f"{IDLE_SESSIONS} clients that have made one small call; the worker's own memory (USS), "
        "which counts their arenas. Target: at most 1 MiB.",
        ("", "KiB"),
        [("each session, in the worker", f"{each / 1024:.0f}")],
    )


def _used(process: psutil.Process) -> int:
    return int(process.memory_full_info().uss)


def _hand_over(server: servers.Server, options: Options) -> Table:
    source = models.floats(HAND_OVER_MIB * MIB)
    copies: list[int] = []
    with Client(server.unix, transport="lane") as giver, Client(server.unix) as taker:
        taker.infer("identity", {"x": models.floats(64)})
        held = [giver.empty(source.shape, source.dtype, shared=True)]
        held[0][...] = source
        taken = []

        def hand_over() -> None:
            offer = giver.export(held[0])
            tensor = taker.receive(offer.token)
            assert tensor.array[-1] == source[-1]
            copies.append(offer.copies)
            taken.append(tensor)

        def renew() -> None:
            taken.pop().release()
            held[0] = giver.empty(source.shape, source.dtype, shared=True)
            held[0][...] = source

        warm = np.empty_like(source)
        contenders = [
            Contender("export, receive, read an element", timed(hand_over, renew)),
            Contender("one memcpy of the size", timed(lambda: np.copyto(warm, source))),
        ]
        series = interleave(contenders, options.seconds)
    rows = [
        (each.name, f"{each.percentile_us(50):.0f}", f"{each.percentile_us(99):.0f}")
        for each in series
    ]
    return Table(
        f"handing {HAND_OVER_MIB} MiB from service to service",
        "Two sessions with the worker, the token passed in memory. Making and filling the tensor "
        "and giving it back are not timed.",
        ("", "p50 us", "p99 us"),
        rows,
        [f"copies of the bytes: {max(copies)}"],
    )
