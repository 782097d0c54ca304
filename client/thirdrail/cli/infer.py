# SPDX-License-Identifier: Apache-2.0
"""`thirdrail infer`: one request, typed in."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from thirdrail.cli import values
from thirdrail.cli.commands import ModelName
from thirdrail.cli.session import console, new_table, print_json, session_of, typed_by_hand
from thirdrail.dtypes import dtype_of_array
from thirdrail.errors import InvalidArgument
from thirdrail.models import ModelDescription
from thirdrail.requests import InferOptions, ParameterValue, Result
from thirdrail.tensors import Array


def infer(
    ctx: typer.Context,
    model: ModelName,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=VALUE", help="One for each input; see the examples."
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option("--output", "-o", metavar="NAME", help="Only this output. Repeatable."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".npy or .npz; any other for one BYTES element."),
    ] = None,
    version: Annotated[int, typer.Option(help="0: the newest that is ready.")] = 0,
    classes: Annotated[int, typer.Option(min=0, metavar="N", help="Print the best N classes.")] = 0,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1e-6, help="Give up after this long.")
    ] = None,
    priority: Annotated[int, typer.Option(min=0, help="1 is the highest; 0: the model's own.")] = 0,
    request_id: Annotated[str, typer.Option(help="Written to the server's log.")] = "",
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", metavar="NAME=VALUE", help="Repeatable.")
    ] = None,
) -> None:
    """Call a model once and print its outputs.

    A value takes the type and shape that the model declares:

    \b
      --input x=1,2,3              numbers
      --input 'x=[[1, 2], [3, 4]]' a JSON list, with its own shape
      --input s=text               text, as one BYTES element
      --input x=@array.npy         a numpy file, as it is
      --input s=@cat.jpg           any other file: one BYTES element, or raw numbers
      --input x=@-                 the same from standard input

    \b
    thirdrail infer digits --input x=@image.npy --save scores.npy
    thirdrail infer digits --input x=@image.npy --classes 3 --json
    """
    session = session_of(ctx)
    with typed_by_hand():
        texts = values.named_texts(inputs or [], "--input")
        named = _parameters(parameters or [])
    options: InferOptions = {
        "outputs": outputs,
        "version": version,
        "request_id": request_id,
        "timeout": timeout,
        "priority": priority,
        "parameters": named,
        "classes": classes,
    }
    with session.client() as client:
        description = client.describe(model, version=version)
        with typed_by_hand():
            arrays = _arrays(texts, description)
        result = client.infer(model, arrays, **options)
    if save is not None:
        with typed_by_hand():
            values.save(save, dict(result))
    if session.as_json:
        print_json(_result_json(result))
    else:
        _print_result(result, save)


def _arrays(texts: dict[str, str], description: ModelDescription) -> dict[str, Array]:
    if not (description.inputs or description.outputs):  # not loaded, as the server will say
        return {}
    specs = {spec.name: spec for spec in description.inputs}
    arrays = {}
    for name, text in texts.items():
        if name not in specs:
            raise InvalidArgument(
                f"unknown input '{name}', the model has {', '.join(specs) or 'none'}"
            )
        arrays[name] = values.array_of_text(text, specs[name])
    return arrays


def _parameters(pairs: list[str]) -> dict[str, ParameterValue]:
    named = values.named_texts(pairs, "--parameter")
    return {name: _parameter(text) for name, text in named.items()}


def _parameter(text: str) -> ParameterValue:
    """true, false and whole numbers are themselves; all else is text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return text


_TIMES = ("queue_ns", "input_copy_ns", "compute_ns", "output_copy_ns")


def _result_json(result: Result) -> dict[str, Any]:
    timing = result.timing
    return {
        "model": result.model_name,
        "version": result.model_version,
        "request_id": result.request_id,
        "outputs": {name: values.json_of_array(array) for name, array in result.items()},
        "timing": {
            **{name: getattr(timing, name) for name in _TIMES},
            "batch_rows": timing.batch_rows,
            "transport": timing.transport,
            "copies": timing.copies,
        },
    }


def _print_result(result: Result, saved: Path | None) -> None:
    out, timing = console(), result.timing
    times = ", ".join(f"{n.removesuffix('_ns')} {getattr(timing, n) / 1e3:.0f}" for n in _TIMES)
    out.print(
        f"[bold]{escape(result.model_name)}[/] version {result.model_version}: "
        f"[dim]{times.replace('_', ' ')} us[/]"
    )
    table = new_table("OUTPUT", "TYPE", "SHAPE", "VALUES")
    for name, array in result.items():
        kind = dtype_of_array(array).name
        shape = escape(str(list(array.shape)))
        table.add_row(escape(name), kind, shape, escape(values.text_of_array(array)))
    out.print(table)
    if saved is not None:
        out.print(f"saved to {escape(str(saved))}")
