# SPDX-License-Identifier: Apache-2.0
"""The demo's tables: what came back beside what was expected, and how long it took."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from thirdrail_server.demo.jobs import Check, Outcome
from thirdrail_server.demo.pinned import PACKAGES, Package
from thirdrail_server.demo.stopwatch import Latency


def print_models(console: Console, repository: Path, fetched: Sequence[Package]) -> None:
    table = _table(f"Models in {repository}")
    for heading in ("file", "taken from", "license", ""):
        table.add_column(heading)
    for package in PACKAGES:
        origin = f"{package.name} {package.version}"
        state = "downloaded" if package in fetched else "there already"
        for file in package.files:
            if file.path.endswith(".onnx"):
                table.add_row(file.path, origin, package.license, state)
    console.print(table)
    console.print()


def print_ready(console: Console, elapsed_s: float) -> None:
    console.print(f"The server was ready after {elapsed_s:.1f} s.\n")


def print_outcome(console: Console, outcome: Outcome) -> None:
    table = _table(outcome.title)
    for heading in (outcome.subject_heading, "expected", "got", outcome.note_heading, ""):
        table.add_column(heading)
    for check in outcome.checks:
        # Text objects: what a model answered is never taken for markup.
        cells = [check.subject, check.expected, check.got, check.note]
        table.add_row(*map(Text, cells), _mark(check))
    console.print(table)
    console.print()


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _mark(check: Check) -> Text:
    return Text("ok", style="green") if check.is_ok else Text("WRONG", style="bold red")


def print_latencies(console: Console, latencies: Sequence[Latency]) -> None:
    table = _table("How long it took, in milliseconds")
    for heading in ("model", "a call with", "over"):
        table.add_column(heading)
    for heading in ("calls", "first", "median", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in latencies:
        rows = str(each.batch_rows_max) if each.batch_rows_max else "-"
        times = (f"{each.first_ms:.1f}", f"{each.median_ms:.1f}")
        table.add_row(each.model, each.kind, each.transport, str(each.calls), *times, rows)
    console.print(table)
    console.print()


def print_summary(console: Console, outcomes: Sequence[Outcome], elapsed_s: float) -> None:
    checks = [check for outcome in outcomes for check in outcome.checks]
    wrong = sum(not check.is_ok for check in checks)
    if wrong:
        text = f"{wrong} of {len(checks)} answers are not what was expected"
        console.print(Text(text, style="bold red"))
    else:
        text = f"All {len(checks)} answers are as expected, in {elapsed_s:.1f} s."
        console.print(Text(text, style="bold green"))


def print_next_steps(console: Console, repository: Path) -> None:
    thirdrail, python = _as_typed("thirdrail"), _as_typed("python")
    steps = (
        ("Now try it yourself. Serve the same models, and leave that running:", ""),
        ("", f"{thirdrail} serve {repository}"),
        ("Then, in another terminal: what is served, and what does it take?", ""),
        ("", f"{thirdrail} models"),
        ("", f"{thirdrail} describe magika"),
        ("What type is /bin/sh, or any file of yours?", ""),
        ("", f"{python} -m thirdrail_server.demo.tokens {repository} /bin/sh |"),
        ("", f"  {thirdrail} infer magika --input bytes=@- --classes 3"),
        ("Watch the server work:", ""),
        ("", f"{thirdrail} top"),
    )
    console.print()
    for text, command in steps:
        line = Text(f"  {command}", style="bold cyan") if command else Text(text)
        console.print(line, soft_wrap=True)  # a command stays one line, to be copied


def _as_typed(command: str) -> str:
    """How to call what is installed beside this Python: by name if that finds it, else by path."""
    own = Path(sys.executable).with_name(command)
    found = shutil.which(command)
    if found and Path(found) == own:
        return command
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def download_display(console: Console) -> Progress:
    """Bars for the wheels on their way; they show on terminals only and leave no trace."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TransferSpeedColumn(), console=console, transient=True)
