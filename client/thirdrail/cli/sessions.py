# SPDX-License-Identifier: Apache-2.0
"""`thirdrail sessions`: who is on the lane; and a place on it for programs in other languages."""

import os
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from thirdrail.cli.figures import dict_of_message
from thirdrail.cli.session import console, new_table, print_json, print_whole, session_of
from thirdrail.errors import Unavailable
from thirdrail.lane.attach import OPEN_TIMEOUT_S, socket_candidates
from thirdrail.server_calls import ANSWER_SECONDS_MAX
from thirdrail.transport import CannotAttach
from thirdrail.v1 import sessions_pb2 as pb
from thirdrail.v1 import sessions_pb2_grpc

MIB = 1 << 20

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Short, so that a terminal of 80 columns has room for a client's name.
_NUMBERS = ("PID", "UID", "AGE", "CALLS", "BUSY", "IN", "OUT", "LEASED", "LEASES", "SHARED")


@app.callback()
def sessions(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Live. Ctrl-C ends it.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 1.0,
) -> None:
    """Show who is on the lane: processes, their memory and calls.

    BUSY counts the calls in flight. In MiB: IN is memory that the client writes, OUT is memory that
    results are written to, LEASED the part of it that the client holds, SHARED is memory of tensors
    that were handed from service to service.
    """
    if ctx.invoked_subcommand is not None:
        return
    session, out = session_of(ctx), console()
    with session.channel() as (_, channel):
        service = sessions_pb2_grpc.SessionsStub(channel)
        if session.as_json or not watch or not out.is_terminal:
            listed = _list(service)
            if session.as_json:
                print_json([_dict_of_session(each) for each in listed.sessions])
            else:
                print_whole(view(listed.sessions))
            if listed.unheard:
                raise Unavailable("; ".join(listed.unheard.values()))
            return
        with Live(Text("…"), console=out, screen=True, auto_refresh=False) as live:
            while True:
                listed = _list(service)
                unheard = map(Text, listed.unheard.values())
                live.update(Group(view(listed.sessions), *unheard), refresh=True)
                time.sleep(interval)


def _list(service: sessions_pb2_grpc.SessionsStub) -> pb.ListSessionsResponse:
    return service.ListSessions(pb.ListSessionsRequest(), timeout=ANSWER_SECONDS_MAX)


@app.command("open")
def open_(
    ctx: typer.Context,
    worker: Annotated[str, typer.Option(help="By default the server's first.")] = "",
) -> None:
    """Ask for a place on the lane: print a socket's path, and a token that is good for one hello.

    For programs in other languages, which need no gRPC then. The token's life is short: connect
    and say hello within a few seconds.
    """
    session = session_of(ctx)
    with session.channel(OPEN_TIMEOUT_S) as (address, channel):
        service = sessions_pb2_grpc.SessionsStub(channel)
        opened = service.OpenSession(pb.OpenSessionRequest(worker=worker), timeout=OPEN_TIMEOUT_S)
    try:
        candidates = socket_candidates(address, opened)
    except CannotAttach as why:
        raise why.as_error() from None
    # Where none is there (the program runs in another container) the server's own view is as good.
    path = next(filter(os.path.exists, candidates), opened.socket_path)
    place = {
        "session": opened.session,
        "worker": opened.worker,
        "socket": path,
        "token": opened.token.hex(),
        "token_life_ms": opened.token_life_ms,
    }
    if session.as_json:
        print_json(place)
    else:
        typer.echo("\n".join(f"{name} {value}" for name, value in place.items()))


def view(found: Iterable[pb.SessionInfo]) -> RenderableType:
    """A row for each. The front is always among them, unless its worker is not heard."""
    table = new_table("ID", "CLIENT", "WORKER", "STATE", *_NUMBERS, right=("ID", *_NUMBERS), gap=1)
    for each in found:
        table.add_row(
            str(each.session),
            escape(_name(each)),
            escape(each.worker),
            _state(each),
            str(each.pid or "-"),
            str(each.uid),
            _age(each.age_s),
            str(each.calls),
            str(each.calls_in_flight),
            *map(_mib, (each.input_bytes, each.output_bytes, each.leased_bytes)),
            str(each.leases),
            _mib(each.shared_bytes),
        )
    return table


def _name(found: pb.SessionInfo) -> str:
    """What a client calls itself is not to be trusted with a terminal."""
    if found.is_front:
        return "(front)"
    return "".join(c if c.isprintable() else "?" for c in found.client_name) or "-"


def _state(found: pb.SessionInfo) -> str:
    return pb.SessionState.Name(found.state).removeprefix("SESSION_STATE_").lower()


def _dict_of_session(found: pb.SessionInfo) -> dict[str, Any]:
    return dict_of_message(found) | {"state": _state(found)}


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}" if size else "0"


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
