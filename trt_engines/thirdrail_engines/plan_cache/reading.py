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
from dataclasses import dataclass

from thirdrail_engines.plan_cache.key import PIECE_BYTES, PlanKey
from thirdrail_engines.plan_cache.layout import MANIFEST, PLAN
from thirdrail_engines.plan_cache.manifest import (
    MANIFEST_BYTES_MAX,
    Manifest,
    ManifestError,
    decoded,
)
from thirdrail_engines.plan_cache.trust import Untrusted, open_trusted


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


def read_and_hash(fd: int, size: int) -> tuple[memoryview, str]:
    """`size` bytes from an open file, and their SHA-256 in hex. Raises Damaged if it has fewer."""
    data = _private_memory(size)
    digest = hashlib.sha256()
    at = 0
    while at < size:
        count = os.preadv(fd, [data[at : at + PIECE_BYTES]], at)
        if not count:
            raise Damaged(f"the plan ends after {at} bytes, expected {size}")
        digest.update(data[at : at + count])
        at += count
    return data.toreadonly(), digest.hexdigest()


def _private_memory(size: int) -> memoryview:
    """Zeroed memory, in huge pages where the kernel gives them: they halve the time to fill it."""
    if not size:
        return memoryview(b"")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _open(name: str, folder: int) -> int:
    try:
        return open_trusted(name, folder)
    except Untrusted as error:
        raise Damaged(f"the file {error}") from None
