# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the client they call through, and how they print."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from thirdrail.channels import TlsOptions, open_channel
from thirdrail.client import Client
from thirdrail.discovery import find_address
from thirdrail.errors import InvalidArgument
from thirdrail.failures import rpc_errors
from thirdrail.server_calls import ANSWER_SECONDS_MAX

_PIPE_COLUMNS = 240  # text is not cut to a terminal's width where there is none
_WIDEST_COLUMNS = 10_000  # no table is wider


@dataclass(frozen=True)
class Session:
    """The options in front of a command."""

    url: str | None
    tls: TlsOptions | None
    as_json: bool

    def client(self) -> Client:
        return Client(self.url, tls=self.tls)

    @contextmanager
    def channel(self, timeout: float = ANSWER_SECONDS_MAX) -> Iterator[tuple[str, grpc.Channel]]:
        """The server's address and a channel to it, for services that Client has no methods of.

        timeout: in seconds, what calls on it are made with.
        """
        address = find_address(self.url, sockets=self.tls is None)
        with open_channel(address, self.tls, None) as channel, rpc_errors(address, timeout):
            yield address, channel


@contextmanager
def typed_by_hand() -> Iterator[None]:
    """What cannot be sent because of how it was typed is a mistake on the command line."""
    try:
        yield
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from None


def session_of(ctx: typer.Context) -> Session:
    assert isinstance(ctx.obj, Session)
    return ctx.obj


def console(*, stderr: bool = False) -> Console:
    """Where people's output goes: made per command, so that it writes to the current streams."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, width=_PIPE_COLUMNS)


def print_whole(content: RenderableType) -> None:
    """Prints it as wide as it is. A narrower terminal breaks the lines: no figure is cut, and what
    is copied from it is whole."""
    out = console()
    options = out.options.update(max_width=_WIDEST_COLUMNS)
    width = max(out.width, Measurement.get(out, options, content).maximum)
    Console(width=width, height=out.height, highlight=False).print(content, crop=False)


def print_notes(notes: Iterable[tuple[str, str]]) -> None:
    """Sentences about rows of a table, below it, where they may be long and can be copied."""
    lines = [f"[bold]{escape(name)}[/]: {escape(text)}" for name, text in notes]
    for line in ["", *lines] if lines else []:
        console().print(line, soft_wrap=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def new_table(*columns: str, right: tuple[str, ...] = (), gap: int = 2) -> Table:
    """A table without lines, so that its rows can be cut and searched as text.

    right: the columns of numbers, which are never broken, as no heading is. gap: spaces between
    two columns.
    """
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for column in columns:
        is_number = column in right
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(
            column,
            justify=justify,
            overflow="fold",
            no_wrap=is_number,
            min_width=len(column) or 1,
        )
    return table
