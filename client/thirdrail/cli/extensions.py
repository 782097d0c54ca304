# SPDX-License-Identifier: Apache-2.0
"""Commands that other packages add to `thirdrail` through the entry points "thirdrail.commands".

The client comes first in the import order, so it learns of them by name. An entry point names a
function with typer's annotations, or a typer app whose callback has the command's name. It is
imported when it is invoked; for `thirdrail --help` its docstring is read from its source.
"""

import ast
import functools
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

GROUP = "thirdrail.commands"
_DEFAULT_EXTRA = "server"

# Those that take `thirdrail`'s own options behind them as well. `serve` has others of these names.
SHARING_OPTIONS = frozenset(("cache", "compile"))


@functools.cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in sorted(metadata.entry_points(group=GROUP))}


def names() -> list[str]:
    return list(_entry_points())


def load(name: str) -> Any:
    """The command itself. Raises ModuleNotFoundError when a package that it needs is missing."""
    loaded = _entry_points()[name].load()
    if isinstance(loaded, typer.Typer):
        group = typer.main.get_command(loaded)
        group.name = name
        return group
    holder = typer.Typer(
        add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
    )
    holder.command(name, cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})(
        loaded
    )
    return typer.main.get_command(holder)


class _Command(TyperCommand):
    """A flag may also be written as --flag=true or --flag=false, as Triton's server has it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {
            name for each in self.params if getattr(each, "is_flag", False) for name in each.opts
        }
        return super().parse_args(ctx, flags_without_values(args, flags))


def flags_without_values(args: list[str], flags: set[str]) -> list[str]:
    """The same wishes about `flags` without values; of several about one flag the last counts."""
    kept: list[str] = []
    for at, arg in enumerate(args):
        if arg == "--":
            return [*kept, *args[at:]]
        flag, _, value = arg.partition("=")
        if flag in flags and value in ("true", "false"):
            kept = [each for each in kept if each != flag]
            if value == "true":
                kept.append(flag)
        else:
            kept.append(arg)
    return kept


def outline(name: str) -> TyperCommand | None:
    """A stand-in with the command's one-line help; None for an unknown name."""
    point = _entry_points().get(name)
    if point is None:
        return None
    text = summary(point.module, point.attr) or summary(point.module, name)
    return TyperCommand(name, help=text)


def summary(module: str, function: str) -> str:
    """The first line of a function's docstring, without running its module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return ""
    if spec is None or spec.origin is None:
        return ""
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def extra_of(name: str) -> str:
    """The extra of our distribution that brings what a command needs: its namesake, if any."""
    try:
        extras = metadata.metadata("thirdrail").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return _DEFAULT_EXTRA
    if name in _entry_points():
        return name if name in extras else _DEFAULT_EXTRA
    return "cli"
