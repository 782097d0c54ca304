# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: tables for a terminal, for a README, and as JSON."""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

PACKAGES = ("grpcio", "protobuf", "onnxruntime", "numpy")


@dataclass(frozen=True, slots=True)
class Table:
    """One table. `includes` says what the numbers cover: client, transport, sizes."""

    title: str
    includes: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = ()

    def print(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for note in (self.includes, *self.notes):
            console.print(f"  {note}", highlight=False)

    def markdown(self) -> str:
        lines = [f"**{self.title}.** {self.includes}", ""]
        lines.append(f"| {' | '.join(self.columns)} |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes), ""]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when it was measured."""

    utc: str
    cores: int
    kernel: str
    python: str
    packages: dict[str, str]
    load_average: float  # of the last minute, before we began

    @classmethod
    def here(cls) -> "Machine":
        return cls(
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            os.cpu_count() or 0,
            platform.release(),
            platform.python_version(),
            {name: version(name) for name in PACKAGES},
            round(os.getloadavg()[0], 2),
        )

    def text(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        return (
            f"{self.utc} UTC, {self.cores} cores, Linux {self.kernel}, Python {self.python}, "
            f"{packages}; load average before: {self.load_average}"
        )


def as_json(machine: Machine, results: dict[str, list[Table]]) -> str:
    fields: dict[str, Any] = {"machine": dataclasses.asdict(machine)}
    fields["results"] = {
        name: [dataclasses.asdict(table) for table in tables] for name, tables in results.items()
    }
    return json.dumps(fields, indent=2)
