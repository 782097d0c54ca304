# SPDX-License-Identifier: Apache-2.0
"""Sealed memory: nobody can truncate it, and a client cannot write what the worker answers with."""

import mmap
import os
import sys
import threading
import time
from itertools import pairwise

import pytest

from thirdrail.lane.memory import create_chunk, map_chunk
from thirdrail_server.worker.process import GIL_SWITCH_S

SIZE = 1 << 16


def test_a_chunk_cannot_be_resized() -> None:
    fd, _ = create_chunk(SIZE, client_writes=True)
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_input_memory_is_shared_both_ways() -> None:
    fd, ours = create_chunk(SIZE, client_writes=True)
    theirs = map_chunk(fd, SIZE, writable=True)
    theirs[:3] = b"abc"
    assert ours[:3] == b"abc"


def test_output_memory_can_only_be_read_by_the_client() -> None:
    fd, ours = create_chunk(SIZE, client_writes=False)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, SIZE)
    os.close(again)
    theirs = map_chunk(fd, SIZE, writable=False)
    ours[:3] = b"abc"
    assert theirs[:3] == b"abc"
    with pytest.raises(TypeError):
        theirs[:3] = b"xyz"


def test_memory_that_could_be_truncated_is_not_mapped() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(ValueError, match="not sealed"):
        map_chunk(fd, SIZE, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)  # it was closed all the same


def test_memory_of_another_size_is_not_mapped() -> None:
    fd, _ = create_chunk(SIZE, client_writes=True)
    with pytest.raises(ValueError, match=f"has {SIZE} bytes, announced were {2 * SIZE}"):
        map_chunk(fd, 2 * SIZE, writable=True)


def longest_wait(size: int) -> float:
    """Of another thread while a chunk is made, as a part of the time that takes."""
    turns_s: list[float] = []
    is_over = threading.Event()

    def take_turns() -> None:
        while not is_over.is_set():
            turns_s.append(time.monotonic())

    other = threading.Thread(target=take_turns)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(GIL_SWITCH_S)
    other.start()
    while not turns_s:
        time.sleep(0)
    began_s = time.monotonic()
    fd, mapping = create_chunk(size, client_writes=True)
    ended_s = time.monotonic()
    is_over.set()
    other.join()
    sys.setswitchinterval(switch_s)
    os.close(fd)
    mapping.close()
    within = [began_s, *(turn for turn in turns_s if began_s < turn < ended_s), ended_s]
    waits_s = [after - before for before, after in pairwise(within)]
    return max(waits_s) / (ended_s - began_s)


def test_other_threads_run_while_the_pages_of_a_chunk_are_made() -> None:
    """A busy host may keep them waiting, but not every time."""
    assert any(longest_wait(128 << 20) < 0.3 for _ in range(20))
