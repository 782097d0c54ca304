# SPDX-License-Identifier: Apache-2.0
"""`thirdrail probe`: which transports work between this process and the server, and how fast."""

import dataclasses

import typer
from rich.markup import escape

from thirdrail.cli import EXIT_REFUSED
from thirdrail.cli.session import (
    console,
    new_table,
    print_json,
    print_notes,
    print_whole,
    session_of,
)
from thirdrail.probing import Findings, TransportFinding, probe_server

MIB = 1 << 20


def probe(ctx: typer.Context) -> None:
    """Try every transport to the server: does it work, why not, how fast is it here.

    ROUND TRIP is of a call without a tensor, TENSOR of one that carries 1 MiB there and back,
    MIB/S what that makes. On the lane the tensor is filled and read in place; what filling and
    reading cost is said below. Exit code 1 where none works.
    """
    session = session_of(ctx)
    with session.channel() as (address, channel):
        findings = probe_server(address, channel, session.tls)
    if session.as_json:
        print_json(dataclasses.asdict(findings))
    else:
        _print(findings)
    if not any(each.works for each in findings.transports):
        raise typer.Exit(EXIT_REFUSED)


def _print(findings: Findings) -> None:
    out = console()
    title = f"thirdrail {escape(findings.server_version)} at {escape(findings.address)}"
    out.print(title, soft_wrap=True)
    numbers = ("ROUND TRIP", "P99", "TENSOR", "P99 ", "MIB/S")
    table = new_table("TRANSPORT", "WORKS", *numbers, right=numbers)
    for each in findings.transports:
        works = "[green]yes[/]" if each.works else "[red]no[/]"
        table.add_row(each.name, works, *_times(each))
    print_whole(table)
    print_notes((each.name, each.reason or each.address) for each in findings.transports)
    if findings.memory is not None:
        out.print(
            f"\nshared memory: this process writes {findings.memory.write_mib_per_s:.0f} MiB/s and "
            f"reads {findings.memory.read_mib_per_s:.0f} MiB/s",
            soft_wrap=True,
        )


def _times(found: TransportFinding) -> list[str]:
    cells: list[str] = []
    for times in (found.round_trip, found.tensor):
        if times is None:
            cells += ["-", "-"]
        else:
            cells += [f"{times.p50_us:.0f} us", f"{times.p99_us:.0f} us"]
    cells.append("-" if found.mib_per_s is None else f"{found.mib_per_s:.0f}")
    return cells
