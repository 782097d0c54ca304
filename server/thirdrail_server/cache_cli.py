# SPDX-License-Identifier: Apache-2.0
"""`thirdrail cache`: what the plan cache holds, whether it is whole, and what of it goes.

Works on the folder itself. No server is needed, and servers that use the folder may go on.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from thirdrail.cli import EXIT_REFUSED
from thirdrail.cli.session import print_json, print_whole, session_of
from thirdrail.errors import FailedPrecondition, InvalidArgument, NotFound
from thirdrail_engines.plan_cache import default_folder
from thirdrail_engines.plan_cache.exporting import Exported, export_plans
from thirdrail_engines.plan_cache.inventory import Entry, entries, fault_of
from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.locks import LockTimeout
from thirdrail_engines.plan_cache.opening import reason_of
from thirdrail_engines.plan_cache.pruning import Pruning, prune_folder
from thirdrail_engines.plan_cache.trust import CacheFolderError, check_folder
from thirdrail_server import cache_tables

GIB = 1 << 30
DAY_S = 86400
DAYS_MAX = 100_000
KEY_LETTERS_MIN = 4  # of a key, to name it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
[bold]Examples[/bold]

\b
  thirdrail cache ls                   what there is
  thirdrail cache show 3f9a            where this plan came from
  thirdrail cache verify               read all plans, compare checksums
  thirdrail cache prune --to-gib 5     the least recently used go
  thirdrail cache export /srv/plans    for other machines
""",
)

CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="The cache's folder. By default thirdrail/plans in $XDG_CACHE_HOME, else in ~/.cache.",
    ),
]
Keys = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY]...", help="Plans by the start of their keys.")
]


@app.callback()
def cache() -> None:
    """Look after the plans that were compiled: list, show, verify, prune, export.

    A plan that is missing or damaged is built again when a model needs it: only time can be lost.
    """


@app.command()
def ls(ctx: typer.Context, cache_dir: CacheDir = None) -> None:
    """List the plans, those first that were used last."""
    with _opened(cache_dir) as layout:
        found = entries(layout)
    if session_of(ctx).as_json:
        print_json([_brief(each) for each in found])
    elif found:
        print_whole(cache_tables.listing(found, time.time_ns()))
    else:
        typer.echo(f"{layout.root} holds no plans.")


@app.command()
def show(
    ctx: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The start of a plan's key.")],
    cache_dir: CacheDir = None,
) -> None:
    """Show where a plan came from: all that its key is made of, its build, layers and tensors."""
    with _opened(cache_dir) as layout:
        entry = _named(entries(layout), [key])[0]
    if session_of(ctx).as_json:
        manifest = dataclasses.asdict(entry.manifest) if entry.manifest else None
        print_json(_brief(entry) | {"manifest": manifest})
    else:
        for each in cache_tables.details(entry, layout, time.time_ns()):
            print_whole(each)


@app.command()
def verify(ctx: typer.Context, keys: Keys = None, cache_dir: CacheDir = None) -> None:
    """Read plans and compare their checksums. Exit code 1 when one is damaged.

    Servers do the same whenever they use a plan, and build a damaged one again.
    """
    with _opened(cache_dir) as layout:
        chosen = filter(_is_plan, _named(entries(layout), keys))
        faults = {each.digest: fault_of(layout, each.digest) for each in chosen}
    damaged = {digest: fault for digest, fault in faults.items() if fault}
    if session_of(ctx).as_json:
        print_json([{"key": digest, "fault": fault} for digest, fault in faults.items()])
    else:
        for digest, fault in damaged.items():
            typer.echo(f"{digest[:12]} is damaged: {fault}")
        typer.echo(f"{cache_tables.plans(len(faults))} verified, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def prune(
    ctx: typer.Context,
    keys: Keys = None,
    to_gib: Annotated[
        float | None,
        typer.Option(
            "--to-gib",
            metavar="GIB",
            min=0,
            max=GIB,
            help="The least recently used, until so much is left.",
        ),
    ] = None,
    unused_days: Annotated[
        float | None,
        typer.Option(
            "--unused-days", metavar="DAYS", min=0, max=DAYS_MAX, help="Not used as long."
        ),
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Those that do not verify. Reads all plans.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All plans.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Remove plans: those named, and those that any option chooses.

    What a server is loading stays. Without a choice only what killed builds have left goes.
    """
    with _opened(cache_dir) as layout:
        named = _named(entries(layout), keys) if keys else []
        pruning = Pruning(
            digests=frozenset(each.digest for each in named),
            bytes_max=None if to_gib is None else int(to_gib * GIB),
            used_before_ns=_days_ago_ns(unused_days),
            damaged=damaged,
            everything=everything,
        )
        done = prune_folder(layout, pruning, is_dry=dry_run)
    if session_of(ctx).as_json:
        print_json(dataclasses.asdict(done) | {"dry_run": dry_run})
    else:
        typer.echo(cache_tables.pruned(done, is_dry=dry_run))


@app.command()
def export(
    ctx: typer.Context,
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="A folder; made if it is missing.")
    ],
    keys: Keys = None,
    cache_dir: CacheDir = None,
) -> None:
    """Copy plans to another cache folder, all of them or those named. Each is verified first.

    The destination is a cache like any other: serve with --read-only-cache DESTINATION, also on
    other machines, and from where nobody can write to it.
    """
    with _opened(cache_dir) as layout:
        chosen = [each.digest for each in _named(entries(layout), keys) if _is_plan(each)]
        done = _exported(layout, chosen, destination)
    if session_of(ctx).as_json:
        print_json(dataclasses.asdict(done))
    else:
        for digest, fault in done.damaged.items():
            typer.echo(f"{digest[:12]} is damaged and was left out: {fault}", err=True)
        typer.echo(
            f"{cache_tables.plans(len(done.copied))} copied to {destination}, "
            f"{len(done.there)} there already"
        )
    if done.damaged:
        raise typer.Exit(EXIT_REFUSED)


def _exported(layout: Layout, digests: Sequence[str], destination: Path) -> Exported:
    """Raises FailedPrecondition where the destination cannot be made or written to, so that the
    cache that is copied is not blamed."""
    try:
        return export_plans(layout, digests, destination)
    except OSError as error:
        where = error.filename or destination
        raise FailedPrecondition(
            f"cannot export to {destination}: {where}: {reason_of(error)}"
        ) from None


@contextmanager
def _opened(cache_dir: Path | None) -> Iterator[Layout]:
    """The folder, if it is one that servers would use. What goes wrong in it ends the command."""
    try:
        folder = cache_dir or default_folder()
    except RuntimeError:
        raise InvalidArgument("this user has no home folder: name a --cache-dir") from None
    try:
        if cache_dir is not None or folder.exists():
            check_folder(folder)
        yield Layout(folder)
    except FileNotFoundError:
        raise NotFound(f"there is no plan cache at {folder}") from None
    except (CacheFolderError, LockTimeout) as error:
        raise FailedPrecondition(str(error)) from None
    except OSError as error:
        where = error.filename or folder
        raise FailedPrecondition(f"the plan cache, {where}: {reason_of(error)}") from None


def _named(found: Sequence[Entry], keys: Sequence[str] | None) -> list[Entry]:
    """Those whose keys begin so; all without any. Raises InvalidArgument, NotFound."""
    return [_one_named(found, key) for key in keys] if keys else list(found)


def _one_named(found: Sequence[Entry], key: str) -> Entry:
    if len(key) < KEY_LETTERS_MIN:
        raise InvalidArgument(f"'{key}' is too short a key, expected {KEY_LETTERS_MIN} letters")
    fitting = [each for each in found if each.digest.startswith(key.lower())]
    if not fitting:
        raise NotFound(f"no plan's key begins with '{key}'; thirdrail cache ls lists them")
    if len(fitting) > 1:
        raise InvalidArgument(
            f"the keys of {len(fitting)} plans begin with '{key}': say more of it"
        )
    return fitting[0]


def _is_plan(entry: Entry) -> bool:
    return not entry.has_only_notes


def _days_ago_ns(days: float | None) -> int | None:
    return None if days is None else time.time_ns() - int(days * DAY_S * 1e9)


def _brief(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "key": entry.digest,
        "key_parts": dict(manifest.key_parts) if manifest else {},
        "source": manifest.source if manifest else "",
        "built_at": manifest.built_at if manifest else "",
        "build_s": manifest.build_s if manifest else None,
        "plan_bytes": manifest.plan_bytes if manifest else 0,
        "bytes": entry.size_bytes,
        "used_s_ago": max(0.0, round((time.time_ns() - entry.used_ns) / 1e9, 1)),
        "in_use": entry.is_in_use,
        "notes": dict(entry.notes),
        "problem": entry.problem,
    }
