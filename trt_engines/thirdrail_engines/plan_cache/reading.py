# SPDX-License-Identifier: Apache-2.0
"""An entry's bytes, read once: what was checked is what is handed over.

The bytes go into private memory. A mapping of the file would be checked, and could then be changed
or cut short by whoever opened the file earlier.

SHA-256 because it comes with Python, `sha256sum` checks the same, and with the SHA instructions
that x86 has had since 2019 it outruns most disks. What else was measured is in bench/README.md. The
checksum is against damage. Against people there are the rules of trust.py: who can write the plan
can write the manifest.
"""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from thirdrail.pages import make_pages
from thirdrail_engines.plan_cache.key import PlanKey
from thirdrail_engines.plan_cache.layout import MANIFEST, PLAN
from thirdrail_engines.plan_cache.locks import open_folder
from thirdrail_engines.plan_cache.manifest import (
    MANIFEST_BYTES_MAX,
    Manifest,
    ManifestError,
    decoded,
)
from thirdrail_engines.plan_cache.trust import Untrusted, open_trusted

PIECE_BYTES = 4 << 20
READ_AT_ONCE_BYTES_MAX = 32 << 20  # glibc's malloc maps larger blocks anew each time


class Damaged(Exception):
    """This entry cannot be used. The text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What engines run. data: read-only, and private to this process."""

    key: PlanKey
    manifest: Manifest
    data: memoryview


def read_entry(key: PlanKey, folder: int) -> Plan:
    """Read and verify the entry in the open folder.

    Raises Damaged; FileNotFoundError when there is no plan, or no longer; OSError.
    """
    manifest = read_manifest(key.digest, folder)
    fd = _open(PLAN, folder)
    try:
        size = os.fstat(fd).st_size
        if size != manifest.plan_bytes:
            raise Damaged(f"the plan has {size} bytes, its manifest says {manifest.plan_bytes}")
        data, digest = read_and_hash(fd, size)
    finally:
        os.close(fd)
    if digest != manifest.plan_sha256:
        raise Damaged("the plan's checksum is not the one in its manifest")
    return Plan(key, manifest, data)


def read_manifest(digest: str, folder: int) -> Manifest:
    """Raises Damaged, FileNotFoundError or OSError."""
    fd = _open(MANIFEST, folder)
    with open(fd, "rb") as file:
        data = file.read(MANIFEST_BYTES_MAX + 1)
    if len(data) > MANIFEST_BYTES_MAX:
        raise Damaged(f"the manifest is larger than {MANIFEST_BYTES_MAX >> 20} MiB")
    try:
        manifest = decoded(data)
    except ManifestError as error:
        raise Damaged(f"the manifest {error}") from None
    if manifest.key != digest:
        raise Damaged(f"the manifest is of another plan, {manifest.key!r}")
    return manifest


def manifests_in(folders: Iterable[Path]) -> Iterator[Manifest]:
    """Of the entries that lie in these; what cannot be read is passed over."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for digest in os.listdir(folder):
                with contextlib.suppress(Damaged, OSError):
                    yield _manifest_in(folder / digest)


def _manifest_in(entry: Path) -> Manifest:
    fd = open_folder(entry)
    try:
        return read_manifest(entry.name, fd)
    finally:
        os.close(fd)


def read_and_hash(fd: int, size: int) -> tuple[memoryview, str]:
    """`size` bytes from an open file, and their SHA-256 in hex. Raises Damaged if it has fewer.

    One thread fills memory with the next piece while this one hashes the last. For plans that fit
    the heap a thread and memory of its own cost more than they save.
    """
    if size <= READ_AT_ONCE_BYTES_MAX:
        with open(fd, "rb", closefd=False) as file:
            data = file.read(size)
        if len(data) < size:
            raise _cut_short(len(data), size)
        return memoryview(data), hashlib.sha256(data).hexdigest()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, thread_name_prefix="plan-reader") as reader:
        pending = reader.submit(_read_piece, fd, memory, 0)
        for at in range(0, size, PIECE_BYTES):
            piece = pending.result()
            pending = reader.submit(_read_piece, fd, memory, at + PIECE_BYTES)
            digest.update(piece)
    return memoryview(memory).toreadonly(), digest.hexdigest()


def _read_piece(fd: int, memory: mmap.mmap, start: int) -> memoryview:
    """Fill one piece; an empty one behind the end. Raises Damaged if the file ends inside."""
    piece = memoryview(memory)[start : start + PIECE_BYTES]
    if not piece:
        return piece
    # All pages at once take a third less time than one by one. Huge ones would take less still, and
    # sometimes three times as much: where memory is in fragments the kernel tidies it up.
    with contextlib.suppress(OSError):  # reading makes them as well, or says why not
        make_pages(memory, start, len(piece))
    at = 0
    while at < len(piece):
        count = os.preadv(fd, [piece[at:]], start + at)
        if not count:
            raise _cut_short(start + at, len(memory))
        at += count
    return piece


def _cut_short(size: int, expected: int) -> Damaged:
    return Damaged(f"the plan ends after {size} bytes, expected {expected}")


def _open(name: str, folder: int) -> int:
    try:
        return open_trusted(name, folder)
    except Untrusted as error:
        raise Damaged(f"the file {error}") from None
