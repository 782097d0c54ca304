# SPDX-License-Identifier: Apache-2.0
"""What a cache folder holds, for people who look after it. Works on folders that are only read."""

import os
from dataclasses import dataclass

from thirdrail_engines.plan_cache.key import PlanKey
from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.locks import open_folder, try_lock
from thirdrail_engines.plan_cache.manifest import Manifest
from thirdrail_engines.plan_cache.opening import reason_of
from thirdrail_engines.plan_cache.reading import Damaged, Plan, read_entry, read_manifest
from thirdrail_engines.plan_cache.store import occupants


@dataclass(frozen=True, slots=True)
class Entry:
    """manifest: None if it cannot be read, or there are only notes; `problem` says why.

    size_bytes: with the notes. used_ns: when it was last used, since the epoch.
    """

    digest: str
    manifest: Manifest | None
    problem: str
    size_bytes: int
    used_ns: int
    is_in_use: bool
    notes: tuple[tuple[str, int], ...]  # names and sizes in bytes
    has_only_notes: bool = False  # the plan is in another cache


def entries(layout: Layout) -> list[Entry]:
    """All entries, those first that were used last. No plan is read. Raises OSError."""
    found = sorted(occupants(layout), key=lambda each: -each.used_ns)
    return [_entry(layout, each.digest, each.size_bytes, each.used_ns) for each in found]


def fault_of(layout: Layout, digest: str) -> str:
    """Read and verify one plan. Returns what is wrong with it, or ""."""
    try:
        read_verified(layout, digest)
    except Damaged as error:
        return str(error)
    except OSError as error:
        return reason_of(error)
    return ""


def read_verified(layout: Layout, digest: str) -> Plan:
    """Raises Damaged, OSError."""
    fd = open_folder(layout.plans / digest)
    try:
        plan = read_entry(PlanKey(digest, {}), fd)
    finally:
        os.close(fd)
    return Plan(PlanKey(digest, plan.manifest.key_parts), plan.manifest, plan.data)


def _entry(layout: Layout, digest: str, size_bytes: int, used_ns: int) -> Entry:
    manifest, problem, is_in_use = None, "", False
    notes = _notes(layout, digest)
    try:
        fd = open_folder(layout.plans / digest)
    except OSError as error:
        is_alone = isinstance(error, FileNotFoundError)
        problem = "only notes, about a plan in another cache" if is_alone else reason_of(error)
        return Entry(digest, None, problem, size_bytes, used_ns, False, notes, is_alone)
    try:
        manifest = read_manifest(digest, fd)
        is_in_use = not try_lock(fd)
    except Damaged as error:
        problem = str(error)
    except OSError as error:
        problem = f"no manifest can be read: {reason_of(error)}"
    finally:
        os.close(fd)
    return Entry(digest, manifest, problem, size_bytes, used_ns, is_in_use, notes)


def _notes(layout: Layout, digest: str) -> tuple[tuple[str, int], ...]:
    try:
        with os.scandir(layout.notes / digest) as listing:
            return tuple(sorted((each.name, each.stat().st_size) for each in listing))
    except OSError:
        return ()
