# SPDX-License-Identifier: Apache-2.0
"""`thirdrail` itself: the options that all commands share, their list, and the exit codes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from thirdrail._version import __version__
from thirdrail.channels import TlsOptions
from thirdrail.cli import (
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    commands,
    extensions,
    infer,
    install_hint,
    probe,
    sessions,
    top,
)
from thirdrail.cli.session import Session, typed_by_hand
from thirdrail.discovery import parse_url
from thirdrail.errors import ThirdrailError
from thirdrail.failures import Unreachable
from thirdrail.v1 import inference_pb2

# Options of `thirdrail` that may also stand behind the command, where people type them.
_SHARED_WITH_VALUE = ("--url", "--tls-ca", "--tls-cert", "--tls-key", "--tls-name")
_SHARED_FLAGS = ("--json", "--tls")

_EPILOG = """
[bold]Examples[/bold]

\b
  thirdrail serve models/                       serve a folder of models
  thirdrail models                              what is there, what is ready
  thirdrail describe digits                     its inputs and outputs
  thirdrail infer digits --input x=@image.npy   call it
  thirdrail top                                 watch the server work
  thirdrail probe                               try every transport
  thirdrail sessions                            who is on the lane
  thirdrail models --json | jq '.[].name'       for programs

[bold]Exit codes[/bold]

\b
  0  it worked
  1  the server said no, is not healthy, or the output cannot be written
  2  the command line is wrong, or a package for it is missing or too old
  3  no server answered
"""


class _Commands(TyperGroup):
    """The client's own commands and those that other packages register by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *extensions.names()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """For the list in --help: other packages' commands are described, not imported."""
        return super().get_command(ctx, cmd_name) or extensions.outline(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in extensions.names():
            ctx.invoked_subcommand = args[0]  # for the hint, if a package is missing
            found: Any = args[0], extensions.load(args[0]), args[1:]
        else:
            found = super().resolve_command(ctx, args)
        _let_help_flow(found[1])
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, shared_options_first(args, {*self.commands, *extensions.SHARING_OPTIONS})
        )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ThirdrailError as error:
            _print_error(error, as_json=bool(ctx.params.get("as_json")))
            code = EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_REFUSED
            raise typer.Exit(code) from None
        except ModuleNotFoundError as error:
            hint = install_hint(error, extensions.extra_of(ctx.invoked_subcommand or "cli"))
            if hint is None:
                raise
            typer.echo(hint, err=True)
            raise typer.Exit(EXIT_USAGE) from None


def _let_help_flow(command: Any) -> None:
    """Paragraphs fill the terminal's lines, and are not broken where the docstring's are."""
    if command is None:
        return
    paragraphs = (command.help or "").split("\n\n")
    command.help = "\n\n".join(
        each if each.startswith("\b") else " ".join(each.split()) for each in paragraphs
    )
    for each in getattr(command, "commands", {}).values():
        _let_help_flow(each)


def shared_options_first(args: list[str], names: set[str]) -> list[str]:
    """Moves shared options from behind one of the commands `names` to before it.

    Raises BadParameter for one without its value, which would take the command for it.
    """
    at = 0
    while at < len(args) and args[at].startswith("-"):
        at += 2 if args[at] in _SHARED_WITH_VALUE else 1
    if at >= len(args) or args[at] not in names:
        return args
    moved: list[str] = []
    kept: list[str] = []
    rest = iter(args[at + 1 :])
    for arg in rest:
        if arg == "--":
            kept += [arg, *rest]
        elif arg in _SHARED_WITH_VALUE:
            value = next(rest, None)
            if value is None:
                raise typer.BadParameter(f"Option '{arg}' requires an argument.")
            moved += [arg, value]
        elif arg in _SHARED_FLAGS or arg.partition("=")[0] in _SHARED_WITH_VALUE:
            moved.append(arg)
        else:
            kept.append(arg)
    return [*args[:at], *moved, args[at], *kept]


def _print_error(error: ThirdrailError, *, as_json: bool) -> None:
    notes = getattr(error, "__notes__", [])
    if as_json:
        reason = inference_pb2.Reason.Name(error.reason).removeprefix("REASON_")
        text = json.dumps({"error": {"reason": reason, "message": str(error), "notes": notes}})
    else:
        text = "\n".join([f"Error: {error}", *(f"  {note}" for note in notes)])
    typer.echo(text, err=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"thirdrail {__version__}")
        raise typer.Exit


@app.callback()
def shared(
    ctx: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="host:port or unix:/path/of/the.sock. By default $THIRDRAIL_URL, else the server "
            "of this host is found.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs, errors included.")
    ] = False,
    tls: Annotated[bool, typer.Option("--tls", help="Connect by TLS.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(exists=True, help="PEM file of whom to trust. Implies --tls.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, help="PEM file of our certificate.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(exists=True, help="PEM file of our private key.")
    ] = None,
    tls_name: Annotated[
        str | None, typer.Option(help="The name to expect in the server's certificate.")
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
) -> None:
    """Call and look after the model server of this host.

    The options below may stand before or behind a command.
    """
    if url:
        with typed_by_hand():
            parse_url(url)
    options = None
    if tls or tls_ca or tls_cert or tls_key or tls_name:
        with typed_by_hand():
            options = TlsOptions(tls_ca, tls_cert, tls_key, tls_name)
    ctx.obj = Session(url, options, as_json)


for command in (
    commands.models,
    commands.describe,
    infer.infer,
    commands.load,
    commands.unload,
    commands.health,
    commands.metrics,
    top.top,
    probe.probe,
):
    app.command()(command)
app.add_typer(sessions.app, name="sessions")
