# SPDX-License-Identifier: Apache-2.0
"""`thirdrail top`: what the server does, live."""

import dataclasses
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from thirdrail.cli.figures import Figures, ModelFigures, figures_between
from thirdrail.cli.session import console, new_table, print_json, print_whole, session_of
from thirdrail.client import Client
from thirdrail.v1.metrics_pb2 import SnapshotResponse

MIB = 1 << 20

# Short, so that a terminal of 80 columns has room for a model's name.
_MODEL_COLUMNS = ("VER", "REQ/S", "ROWS/S", "BAD/S", "BATCH", "LATENCY", "QUEUE", "COMPUTE")
_NOW_COLUMNS = ("WAIT", "RUN")
_WORKER_COLUMNS = ("PID", "RESTARTS", "MEMORY", "SESSIONS", "ARENAS")


def top(
    ctx: typer.Context,
    interval: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.1, help="Between two looks. \\[default: 1]"),
    ] = None,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Print the figures since the server's start, or of one --interval, and exit.",
        ),
    ] = False,
) -> None:
    """Watch models, queues, batches, latencies and workers. Ctrl-C ends it.

    Rates and means are those of the last interval; WAIT and RUN count the requests that wait and
    run at this moment. LATENCY is from receipt to reply, QUEUE a request's wait, COMPUTE the run of
    a batch, each in milliseconds. BAD counts requests that failed, were refused, timed out or were
    cancelled.
    """
    session, out = session_of(ctx), console()
    with session.client() as client:
        if once or session.as_json or not out.is_terminal:
            figures = _sample(client, interval)
            if session.as_json:
                print_json(dataclasses.asdict(figures))
            else:
                print_whole(view(figures))
            return
        before = SnapshotResponse()
        with Live(Text("…"), console=out, screen=True, auto_refresh=False) as live:
            while True:
                after = client.snapshot()
                live.update(view(figures_between(before, after)), refresh=True)
                before = after
                time.sleep(interval or 1.0)


def _sample(client: Client, interval_s: float | None) -> Figures:
    before = SnapshotResponse()
    if interval_s is not None:
        before = client.snapshot()
        time.sleep(interval_s)
    return figures_between(before, client.snapshot())


def view(figures: Figures) -> RenderableType:
    """One screen."""
    minutes, seconds = divmod(int(figures.uptime_s), 60)
    hours, minutes = divmod(minutes, 60)
    head = Text(f"thirdrail {figures.server_version}, up {hours}:{minutes:02}:{seconds:02}")
    numbers = (*_MODEL_COLUMNS, *_NOW_COLUMNS)
    models = new_table("MODEL", *numbers, right=numbers, gap=1)
    for model in figures.models:
        models.add_row(escape(model.name), *_model_cells(model))
    workers = new_table("WORKER", "STATE", *_WORKER_COLUMNS, right=_WORKER_COLUMNS)
    for worker in figures.workers:
        workers.add_row(
            escape(worker.name),
            "[green]serving[/]" if worker.is_serving else "[red]not serving[/]",
            str(worker.pid),
            str(worker.restarts),
            f"{worker.resident_bytes / MIB:.0f} MiB",
            str(worker.sessions),
            f"{worker.arena_bytes / MIB:.0f} MiB",
        )
    return Group(head, Text(), models, Text(), workers)


def _model_cells(model: ModelFigures) -> list[str]:
    not_ok = _rate(model.not_ok_per_s)
    return [
        str(model.version),
        _rate(model.requests_per_s),
        _rate(model.rows_per_s),
        f"[red]{not_ok}[/]" if model.not_ok_per_s else not_ok,
        _mean(model.batch_rows_mean, 1),
        _mean(model.latency_ms_mean, 2),
        _mean(model.queue_ms_mean, 2),
        _mean(model.compute_ms_mean, 2),
        str(model.queued),
        str(model.running),
    ]


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _mean(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
