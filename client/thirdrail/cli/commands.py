# SPDX-License-Identifier: Apache-2.0
"""The commands that ask about models and the server, and load and unload."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from thirdrail.cli import EXIT_REFUSED
from thirdrail.cli.bars import load_bar
from thirdrail.cli.figures import dict_of_message
from thirdrail.cli.session import (
    console,
    new_table,
    print_json,
    print_notes,
    print_whole,
    session_of,
)
from thirdrail.models import EngineReport, ModelDescription, ModelStatus
from thirdrail.tensors import TensorSpec

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]

_PROOF_COLUMNS = ("MAX ERROR", "MEAN ERROR", "RELATIVE", "COSINE")
_REFERENCES = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch", "": "the reference"}
_STATE_STYLES = {"ready": "green", "unavailable": "red"}


def models(
    ctx: typer.Context,
    ready: Annotated[bool, typer.Option("--ready", help="Only those that can serve.")] = False,
) -> None:
    """List the models, their versions, states and engines, and why one is not as it should be."""
    session = session_of(ctx)
    with session.client() as client:
        found = client.models(ready_only=ready)
    if session.as_json:
        print_json([dataclasses.asdict(status) for status in found])
        return
    if not found:
        typer.echo("The server has no models.")
        return
    table = new_table("MODEL", "VERSION", "STATE", "ENGINE", "WORKER", right=("VERSION",))
    for status in found:
        state = f"[{_STATE_STYLES.get(status.state, 'yellow')}]{status.state}[/]"
        version = str(status.version or "-")
        cells = map(escape, (status.engine or "-", status.worker or "-"))
        table.add_row(escape(status.name), version, state, *cells)
    print_whole(table)
    print_notes((_title(each), _reason(each)) for each in found if _reason(each))


def _title(status: ModelStatus) -> str:
    return f"{status.name} {status.version}" if status.version else status.name


def _reason(status: ModelStatus) -> str:
    """Why it does not serve, or not with the engine of first choice, and what is done about it."""
    loading = f"loading: {status.load_phase}" if status.load_phase else ""
    why = "" if loading and status.state == "loading" else status.reason
    return "; ".join(filter(None, (why, status.engine_reason, loading)))


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
    fields["engine_report"] = dataclasses.asdict(found.engine_report)
    for kind in ("inputs", "outputs"):
        fields[kind] = [
            {"name": s.name, "datatype": s.dtype.name, "shape": s.shape, "optional": s.optional}
            for s in fields[kind]
        ]
    return fields


def _print_description(found: ModelDescription) -> None:
    out, status = console(), found.status
    title = f"[bold]{escape(status.name)}[/] version {status.version}, {status.state}"
    if not status.is_ready or not (found.inputs or found.outputs):  # not loaded
        out.print(
            f"{title}: {escape(_reason(status))}" if _reason(status) else title, soft_wrap=True
        )
        return
    batching = (
        f"up to {found.batch_rows_max} rows a batch" if found.batch_rows_max else "no batching"
    )
    out.print(
        f"{title}, {escape(status.engine)} on {escape(status.worker)}, {batching}, "
        f"{found.instances} instance(s)"
    )
    table = new_table("", "NAME", "TYPE", "SHAPE", "")
    for kind, specs in (("input", found.inputs), ("output", found.outputs)):
        for spec in specs:
            shape = escape(str(list(spec.shape)))
            table.add_row(kind, escape(spec.name), spec.dtype.name, shape, _remarks(spec, found))
    out.print(table)
    _print_engine(found.engine_report, status)
    for warning in found.warnings:
        out.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)


def _print_engine(report: EngineReport, status: ModelStatus) -> None:
    out = console()
    if status.engine_reason:
        out.print(
            f"[yellow]engine[/] {escape(status.engine)}, because {escape(status.engine_reason)}",
            soft_wrap=True,
        )
    if report.plan_key:
        origin = "found in the cache, built" if report.is_cache_hit else "built for this load"
        precision = f", {report.precision}" if report.precision else ""
        out.print(f"plan {report.plan_key[:12]}: {origin} in {report.build_s:.1f} s{precision}")
    if report.proofs:
        table = new_table("OUTPUT", *_PROOF_COLUMNS, right=_PROOF_COLUMNS)
        for each in report.proofs:
            figures = (each.max_abs_error, each.mean_abs_error, each.max_rel_error)
            cells = (*(f"{figure:.2g}" for figure in figures), f"{each.cosine:.6f}")
            table.add_row(
                escape(each.output), *(cells if each.compared else ("not compared", "-", "-", "-"))
            )
        reference = _REFERENCES.get(report.proof_reference, report.proof_reference)
        out.print(f"against {escape(reference)} on the CPU:", table)


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
    """Load a model, or load it anew. Needs a server with --model-control explicit.

    Says which versions are ready, and why one is not, or runs on another engine than its first.
    """
    session = session_of(ctx)
    text = _text_of(config) if config else ""
    try:
        with session.client() as client:
            with load_bar(model) as show:
                versions = client.load(model, config_pbtxt=text, progress=show)
            found = [] if session.as_json else client.models()
    except KeyboardInterrupt:
        typer.echo(f"The load goes on. To end it: thirdrail unload {model}", err=True)
        raise
    if session.as_json:
        print_json({"model": model, "versions": versions})
    else:
        typer.echo(f"{model} is ready: version {', '.join(map(str, versions))}")
        for each in found:  # a version that failed beside others, or runs on another engine
            if each.name == model and (reason := _reason(each)):
                typer.echo(f"{_title(each)}: {reason}", err=True)


def _text_of(config: Path) -> str:
    try:
        return config.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{config} is no text in UTF-8", param_hint="--config") from None


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
