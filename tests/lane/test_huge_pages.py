# SPDX-License-Identifier: Apache-2.0
"""Chunks are made of pages of 2 MiB where the kernel gives them, of others where it does not."""

import mmap
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from thirdrail import pages
from thirdrail.lane.memory import create_chunk, map_chunk, whole_pages
from thirdrail.pages import HUGE_PAGE_BYTES
from thirdrail_server.worker.chunks import Budget, charge_nothing

MIB = 1 << 20
SIZE = 4 * HUGE_PAGE_BYTES


def figure(mapping: mmap.mmap, name: str) -> int:
    """Bytes, from /proc/self/smaps (proc(5)), of the mapping's area. It may have been merged with
    another only if they map the same file.
    """
    start = int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])
    areas = Path("/proc/self/smaps").read_text().split("VmFlags:")
    area = next(each for each in areas if f"\n{start:x}-" in each)
    line = next(each for each in area.splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def in_huge_pages(mapping: mmap.mmap) -> int:
    return figure(mapping, "ShmemPmdMapped")


@pytest.fixture
def gives_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """MADV_COLLAPSE is from Linux 6.1, aligned anonymous memory from 6.7."""
    release = os.uname().release
    major, minor = (int(part) for part in release.split("-")[0].split(".")[:2])
    if (major, minor) < (6, 7) or not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip(f"Linux {release} makes no huge pages of shared memory by MADV_COLLAPSE")
    monkeypatch.setattr(pages, "HUGE_PAGES_S_MAX", 60)  # however busy the host is


@pytest.mark.usefixtures("gives_huge_pages")
@pytest.mark.parametrize("client_writes", [True, False])
def test_both_sides_map_a_chunk_by_huge_pages(client_writes: bool) -> None:
    fd, ours = create_chunk(SIZE, client_writes=client_writes)
    theirs = map_chunk(fd, SIZE, writable=client_writes)
    ours[-3:] = b"abc"
    assert theirs[-3:] == b"abc"
    assert theirs[0:SIZE:HUGE_PAGE_BYTES] == bytes(4)
    assert in_huge_pages(ours) == in_huge_pages(theirs) == SIZE


def test_a_limit_of_private_memory_does_not_concern_shared_memory() -> None:
    """RLIMIT_DATA, or vm.overcommit_memory=2: what is shared does not count for these."""
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + 16 * MIB, limits[1]))
    try:
        fd, ours = create_chunk(32 * MIB, client_writes=True)
        theirs = map_chunk(fd, 32 * MIB, writable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    ours[-1:] = b"x"
    assert theirs[-1:] == b"x"


@pytest.mark.usefixtures("gives_huge_pages")
def test_a_host_that_takes_long_to_find_them_is_not_asked_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "HUGE_PAGES_S_MAX", 0)
    fd, mapping = create_chunk(SIZE, client_writes=True)
    os.close(fd)
    assert in_huge_pages(mapping) == HUGE_PAGE_BYTES
    assert figure(mapping, "Rss") == SIZE  # the others are there as well


WITHOUT = """
import ctypes, mmap, os, sys
PR_SET_THP_DISABLE = 41  # linux/prctl.h
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
sys.path.insert(0, sys.argv[1])
from test_huge_pages import SIZE, create_chunk, figure, in_huge_pages, map_chunk
fd, ours = create_chunk(SIZE, client_writes=False)
theirs = map_chunk(fd, SIZE, writable=False)
ours[-3:] = b"abc"
print(theirs[-3:], figure(ours, "Rss") == SIZE, in_huge_pages(ours))
"""


def test_a_process_that_gets_none_has_ordinary_pages() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "b'abc' True 0\n"


@pytest.mark.parametrize("size", [mmap.PAGESIZE, HUGE_PAGE_BYTES + mmap.PAGESIZE])
def test_a_chunk_of_another_size_has_ordinary_pages(size: int) -> None:
    fd, ours = create_chunk(size, client_writes=False)
    theirs = map_chunk(fd, size, writable=False)
    ours[-3:] = b"abc"
    assert theirs[-3:] == b"abc"
    assert len(ours) == len(theirs) == size
    assert figure(ours, "Rss") == size
    assert in_huge_pages(ours) == in_huge_pages(theirs) == 0


def test_a_client_cannot_write_results_by_huge_pages_either() -> None:
    fd, _ = create_chunk(SIZE, client_writes=False)
    theirs = map_chunk(fd, SIZE, writable=False)
    with pytest.raises(TypeError):
        theirs[:3] = b"xyz"
    assert not np.frombuffer(theirs, np.uint8).flags.writeable


@pytest.mark.parametrize(
    ("size", "memory"),
    [
        (0, mmap.PAGESIZE),
        (1 * MIB, 1 * MIB),
        (16 * MIB - 5, 16 * MIB),
        (1920 * 1080 * 3, 6 * MIB),
        (16 * MIB + 1, 18 * MIB),
        (7 * MIB + MIB // 2, 8 * MIB),
        (7 * MIB, 7 * MIB),  # a seventh more would be too much
        (3 * MIB, 3 * MIB),
        (2 * MIB + 1, 2 * MIB + mmap.PAGESIZE),
    ],
)
def test_a_tensor_alone_gets_huge_pages_where_they_waste_little(size: int, memory: int) -> None:
    assert whole_pages(size) == memory


def test_an_arena_grows_by_powers_of_two() -> None:
    budget = Budget(128 * MIB, charge_nothing)
    grown = [budget.take_chunk(size * MIB) for size in (1, 2, 1, 16, 1, 3)]
    assert [size // MIB for size in grown if size] == [1, 2, 2, 16, 16, 32]
