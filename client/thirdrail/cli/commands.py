# SPDX-License-Identifier: Apache-2.0
"""The commands that ask about models and the server, and load and unload."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from thirdrail.cli import EXIT_REFUSED
from thirdrail.cli.figures import dict_of_message
from thirdrail.cli.session import console, new_table, print_json, session_of
from thirdrail.models import LoadProgress, ModelDescription
from thirdrail.tensors import TensorSpec

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]

_STATE_STYLES = {"ready": "green", "unavailable": "red"}


def models(
    ctx: typer.Context,
    ready: Annotated[bool, typer.Option("--ready", help="Only those that can serve.")] = False,
) -> None:
    """List the models, their versions and states, and why one is not ready."""
    session = session_of(ctx)
    with session.client() as client:
        found = client.models(ready_only=ready)
    if session.as_json:
        print_json([dataclasses.asdict(status) for status in found])
        return
    table = new_table("MODEL", "VERSION", "STATE", "ENGINE", "WORKER", "REASON", right=("VERSION",))
    for status in found:
        state = f"[{_STATE_STYLES.get(status.state, 'yellow')}]{status.state}[/]"
        version = str(status.version or "-")
        cells = map(escape, (status.engine, status.worker, status.reason))
        table.add_row(escape(status.name), version, state, *cells)
    console().print(table if found else "The server has no models.")


def describe(
    ctx: typer.Context,
    model: ModelName,
    version: Annotated[int, typer.Option(help="0: the newest that is ready.")] = 0,
    config: Annotated[
        bool, typer.Option("--config", help="Print only the configuration in force.")
    ] = False,
) -> None:
    """Show a model's inputs, outputs, batching and configuration."""
    session = session_of(ctx)
    with session.client() as client:
        found = client.describe(model, version=version)
    if session.as_json:
        print_json(_description_json(found))
    elif config:
        typer.echo(found.config_pbtxt)
    else:
        _print_description(found)


def _description_json(found: ModelDescription) -> dict[str, Any]:
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    fields["status"] = dataclasses.asdict(found.status)
    for kind in ("inputs", "outputs"):
        fields[kind] = [
            {"name": s.name, "datatype": s.dtype.name, "shape": s.shape, "optional": s.optional}
            for s in fields[kind]
        ]
    return fields


def _print_description(found: ModelDescription) -> None:
    out, status = console(), found.status
    batching = (
        f"up to {found.batch_rows_max} rows a batch" if found.batch_rows_max else "no batching"
    )
    out.print(
        f"[bold]{escape(status.name)}[/] version {status.version}, {status.state}, "
        f"{escape(status.engine)} on {escape(status.worker)}, {batching}, "
        f"{found.instances} instance(s)"
    )
    table = new_table("", "NAME", "TYPE", "SHAPE", "")
    for kind, specs in (("input", found.inputs), ("output", found.outputs)):
        for spec in specs:
            shape = escape(str(list(spec.shape)))
            table.add_row(kind, escape(spec.name), spec.dtype.name, shape, _remarks(spec, found))
    out.print(table)
    for warning in found.warnings:
        out.print(f"[yellow]warning[/] {escape(warning)}")


def _remarks(spec: TensorSpec, found: ModelDescription) -> str:
    remarks = ["optional"] if spec.optional else []
    if spec in found.inputs and spec.name in found.inputs_in_place:
        remarks.append("read in place")
    return ", ".join(remarks)


def load(
    ctx: typer.Context,
    model: ModelName,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Use this config.pbtxt instead."),
    ] = None,
) -> None:
    """Load a model, or load it anew. Needs a server with --model-control explicit."""
    session = session_of(ctx)
    text = config.read_text(encoding="utf-8") if config else ""
    columns = (TextColumn("{task.fields[model]}"), BarColumn(), TextColumn("{task.description}"))
    err = console(stderr=True)
    bars = Progress(*columns, console=err, disable=not err.is_terminal)
    with session.client() as client, bars:
        bar = bars.add_task("", model=model, total=None)

        def show(at: LoadProgress) -> None:
            bars.update(bar, description=at.phase, completed=at.step, total=at.steps or None)

        versions = client.load(model, config_pbtxt=text, progress=show)
    if session.as_json:
        print_json({"model": model, "versions": versions})
    else:
        typer.echo(f"{model} is ready: version {', '.join(map(str, versions))}")


def unload(ctx: typer.Context, model: ModelName) -> None:
    """Unload a model. Requests that are running finish first."""
    session = session_of(ctx)
    with session.client() as client:
        client.unload(model)
    if session.as_json:
        print_json({"model": model, "unloaded": True})
    else:
        typer.echo(f"{model} is unloaded")


def health(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="All of it by default.")] = "",
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="Wait until it can serve, this long at most.")
    ] = 0.0,
) -> None:
    """Say whether the server, or a model, can serve now: exit code 0 if so, 1 if not."""
    session = session_of(ctx)
    with session.client() as client:
        if wait:
            client.wait_ready(wait, model=model)
        serving = client.health(model)
    if session.as_json:
        print_json({"model": model or None, "serving": serving})
    else:
        typer.echo("serving" if serving else "not serving")
    if not serving:
        raise typer.Exit(EXIT_REFUSED)


def metrics(ctx: typer.Context) -> None:
    """Print the server's metrics as Prometheus text; as numbers with --json."""
    session = session_of(ctx)
    with session.client() as client:
        if session.as_json:
            print_json(dict_of_message(client.snapshot()))
        else:
            typer.echo(client.metrics(), nl=False)
