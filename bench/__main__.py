# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: runs the benchmarks and prints their tables."""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Protocol, cast

import typer
from rich.console import Console

from bench.options import Options
from bench.report import Machine, Table, as_json

NAMES = (
    "identity",
    "batching",
    "wire",
    "neighbours",
    "size",
    "transport",
    "plan_cache",
    "compile",
)
FILE_COLUMNS = 140  # where the output goes into a file
ASKED_FOR_ONLY = ("triton", "gpu")  # which downloads a large package, and needs a GPU


class Benchmark(Protocol):
    """What each benchmark's module offers."""

    QUESTION: str

    def run(self, options: Options) -> Iterator[Table]: ...


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which to run; all but triton and gpu without any.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the benchmarks and exit.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Load for each contender in each setting, in seconds.")
    ] = 3.0,
    twin: Annotated[
        bool, typer.Option("--twin", help="Run `gpu` without one; its figures say nothing.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here, too.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables here, for README.md.")
    ] = None,
) -> None:
    """Measure Thirdrail. What the figures mean and what was found is in bench/README.md."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_COLUMNS
    if list_only:
        for name in (*NAMES, *ASKED_FOR_ONLY):
            console.print(f"{name:12}{_benchmark(name).QUESTION}", highlight=False)
        return
    machine = Machine.here()
    console.print(machine.text(), highlight=False)
    results: dict[str, list[Table]] = {}
    for name in names or NAMES:
        benchmark = _benchmark(name)
        with tempfile.TemporaryDirectory(prefix="thirdrail-bench-") as folder:
            results[name] = []
            for table in benchmark.run(Options(seconds, Path(folder), twin)):
                table.print(console)
                results[name].append(table)
    if json_file is not None:
        json_file.write_text(as_json(machine, results))
    if markdown_file is not None:
        tables = [table.markdown() for each in results.values() for table in each]
        markdown_file.write_text("\n".join([f"{machine.text()}\n", *tables]))


def _benchmark(name: str) -> Benchmark:
    if name not in (*NAMES, *ASKED_FOR_ONLY):
        known = ", ".join((*NAMES, *ASKED_FOR_ONLY))
        raise typer.BadParameter(f"there is no benchmark '{name}', only {known}")
    return cast(Benchmark, importlib.import_module(f"bench.{name}"))


if __name__ == "__main__":
    typer.run(main)
