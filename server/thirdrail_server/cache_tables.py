# SPDX-License-Identifier: Apache-2.0
"""What `thirdrail cache` prints for people. Pure. Manifests are not trusted with a terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from thirdrail.cli.session import new_table
from thirdrail_engines.plan_cache.inventory import Entry
from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.manifest import Manifest
from thirdrail_engines.plan_cache.pruning import Pruned

MIB = 1 << 20
KEY_LETTERS = 12
REPORT_LINES_MAX = 40

_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
_NOT_SAID = {"", "null", "[]", "{}", "false"}


def listing(found: Sequence[Entry], now_ns: int) -> RenderableType:
    """One line for each, and their sum."""
    table = new_table(
        "KEY", "MODEL", "BUILDER", "PRECISION", "FOR", "MIB", "BUILD S", "USED", "", right=_RIGHT
    )
    for each in found:
        table.add_row(each.digest[:KEY_LETTERS], *_columns(each, now_ns))
    total = sum(each.size_bytes for each in found)
    count = sum(not each.has_only_notes for each in found)
    table.caption = f"{plans(count)}, {total / MIB:.1f} MiB"
    table.caption_justify = "left"
    return table


_RIGHT = ("MIB", "BUILD S", "USED")


def _columns(entry: Entry, now_ns: int) -> Iterator[str]:
    manifest = entry.manifest or Manifest()
    parts = manifest.key_parts
    builder = f"{parts.get('builder', '-')} {parts.get('builder_version', '')}"
    yield plain("/".join(PurePath(manifest.source).parts[-3:]) or "-")
    yield plain(builder.strip())
    yield plain(parts.get("precision", "-"))
    target = _targets(parts.get("compute_capabilities", "")) or "this machine"
    yield plain("-" if entry.has_only_notes else target)
    yield f"{entry.size_bytes / MIB:.1f}"
    yield f"{manifest.build_s:.1f}" if entry.manifest else "-"
    yield age(now_ns - entry.used_ns)
    yield _state(entry)


def _state(entry: Entry) -> str:
    if entry.has_only_notes:
        return "[dim]notes only[/]"
    if entry.problem:
        return "[red]damaged[/]"
    return "[green]in use[/]" if entry.is_in_use else ""


def details(entry: Entry, layout: Layout, now_ns: int) -> Iterator[RenderableType]:
    facts = [(printable(name), printable(value)) for name, value in _facts(entry, layout, now_ns)]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        yield Text.assemble((name.ljust(width + 2), "bold"), value)
    if entry.manifest is None:
        return
    if entry.manifest.tensors:
        yield Text()
        yield _tensors(entry.manifest)
    yield from _report("layers", entry.manifest.layers)
    yield from _report("precision", entry.manifest.precision)


def _facts(entry: Entry, layout: Layout, now_ns: int) -> Iterator[tuple[str, str]]:
    manifest = entry.manifest
    yield "key", entry.digest
    yield "folder", str(layout.plans / entry.digest)
    if entry.problem:
        yield "problem", entry.problem
    if manifest is not None:
        yield "source", manifest.source or "not said"
        yield "built", f"{manifest.built_at or 'at a time not said'}, in {manifest.build_s:.1f} s"
        if manifest.peak_rss_bytes:
            yield "build's memory", f"{manifest.peak_rss_bytes / MIB:.0f} MiB"
        yield "plan", f"{manifest.plan_bytes} bytes, sha256 {manifest.plan_sha256}"
    in_use = ", in use now" if entry.is_in_use else ""
    yield "last used", f"{age(now_ns - entry.used_ns)} ago{in_use}"
    if manifest is not None:
        for name, value in manifest.key_parts.items():
            if value not in _NOT_SAID:
                yield f"key: {name}", value
        for warning in manifest.warnings:
            yield "warning", warning
    for name, size in entry.notes:
        yield "note", f"{name}, {size} bytes"


def _report(title: str, value: Mapping[str, Any] | None) -> Iterator[RenderableType]:
    if not value:
        return
    lines = json.dumps(value, indent=2, ensure_ascii=False).splitlines()
    yield Text(f"\n{title}", style="bold")
    yield Text("\n".join(map(printable, lines[:REPORT_LINES_MAX])))
    if len(lines) > REPORT_LINES_MAX:
        yield Text(f"... {len(lines) - REPORT_LINES_MAX} more lines with --json", style="dim")


def _tensors(manifest: Manifest) -> RenderableType:
    table = new_table("", "NAME", "TYPE", "SHAPE")
    for each in manifest.tensors:
        table.add_row(
            *(plain(str(each.get(n, "-"))) for n in ("direction", "name", "type", "shape"))
        )
    return table


def pruned(done: Pruned, *, is_dry: bool) -> str:
    lines = [
        f"{'would remove' if is_dry else 'removed'} {each[:KEY_LETTERS]}" for each in done.removed
    ]
    lines += [f"kept {each[:KEY_LETTERS]}: in use" for each in done.in_use]
    freed = f"{done.freed_bytes / MIB:.1f} MiB"
    swept = f", and what {done.swept} killed builds left" if done.swept else ""
    lines.append(f"{plans(len(done.removed))}, {freed}{swept}")
    return "\n".join(lines)


def plans(count: int) -> str:
    return "1 plan" if count == 1 else f"{count} plans"


def age(nanoseconds: int) -> str:
    seconds = max(0, nanoseconds // 10**9)
    for unit_s, unit in _AGES:
        if seconds >= 2 * unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"


def plain(text: str) -> str:
    return escape(printable(text))


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _targets(capabilities: str) -> str:
    """'["sm86","sm89"]' -> 'sm86,sm89'"""
    try:
        return ",".join(map(str, json.loads(capabilities)))
    except (ValueError, TypeError):
        return capabilities
