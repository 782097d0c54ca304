# SPDX-License-Identifier: Apache-2.0
"""The demo from start to end: fetch, serve, send, compare, stop."""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

import thirdrail
from thirdrail.errors import Unavailable
from thirdrail_server.demo import report
from thirdrail_server.demo.child_server import ServerError, serving, wait_until_ready
from thirdrail_server.demo.fetch import FetchError, fetch
from thirdrail_server.demo.jobs import JOBS, Outcome
from thirdrail_server.demo.pinned import PACKAGES, Package
from thirdrail_server.demo.stopwatch import Stopwatch

MODELS = {Path(file.path).parts[0] for package in PACKAGES for file in package.files}


def run_demo(repository: Path, *, wheels: Path | None, fetch_only: bool) -> int:
    """Returns the exit code: 0 if every answer is as expected, else 1."""
    console = Console()
    try:
        with _stopped_by_signals():
            _fetch(console, repository, wheels)
            is_ok = fetch_only or _serve_and_compare(console, repository)
    except (FetchError, ServerError, thirdrail.ThirdrailError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    report.print_next_steps(console, repository)
    return 0 if is_ok else 1


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that the server is stopped on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(console: Console, repository: Path, wheels: Path | None) -> None:
    with report.download_display(console) as display:
        tasks = {
            package.name: display.add_task(
                f"{package.name} {package.version}", total=package.wheel_bytes, visible=False
            )
            for package in PACKAGES
        }

        def show(package: Package, done_bytes: int) -> None:
            display.update(tasks[package.name], completed=done_bytes, visible=True)

        fetched = fetch(repository, wheels=wheels, progress=show)
    report.print_models(console, repository, fetched)


def _serve_and_compare(console: Console, repository: Path) -> bool:
    with tempfile.TemporaryDirectory(prefix="thirdrail-demo-") as folder:
        socket, log = Path(folder) / "grpc.sock", Path(folder) / "server.log"
        with (
            serving(repository, socket, log) as process,
            thirdrail.Client(f"unix:{socket}") as client,
        ):
            start = time.monotonic()
            with console.status("The server is loading the models"):
                wait_until_ready(process, log, lambda: _is_ready(client))
            report.print_ready(console, time.monotonic() - start)
            return _compare(console, client, repository)


def _is_ready(client: thirdrail.Client) -> bool:
    """Whether the demo's models are; others in the folder may load slowly or not at all.

    Raises ServerError when one of them failed to load.
    """
    try:
        statuses = [status for status in client.models() if status.name in MODELS]
    except Unavailable:
        return False
    for status in statuses:
        if status.state == "unavailable" and status.reason:
            raise ServerError(f"{status.name} could not be loaded: {status.reason}")
    return {status.name for status in statuses if status.is_ready} == MODELS


def _compare(console: Console, client: thirdrail.Client, repository: Path) -> bool:
    stopwatch = Stopwatch(client.infer)
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for job in JOBS:
        outcomes.append(job(stopwatch, repository))
        report.print_outcome(console, outcomes[-1])
    report.print_latencies(console, stopwatch.latencies())
    report.print_summary(console, outcomes, time.monotonic() - start)
    return all(check.is_ok for outcome in outcomes for check in outcome.checks)
