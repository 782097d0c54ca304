# SPDX-License-Identifier: Apache-2.0
"""Tensors in shared memory that another process writes to all the time.

Whole contents in turn: single bytes that change are too rarely seen by an operator while it runs.
Around the tensors lies FILLING, which no test uses as data.
"""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.killable import until
from thirdrail.tensors import Array

FILLING = b"\xee"
PAGE = mmap.PAGESIZE

Contents = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Scribbled:
    places: Mapping[str, int]  # where each tensor begins
    rounds: Callable[[], int]  # how often everything was overwritten so far


def memory_bytes(contents: Contents) -> int:
    """How much memory `scribbled` needs."""
    return sum(3 * (whole.nbytes + 2 * PAGE) for whole, _ in contents.values()) + 2 * PAGE


@contextmanager
def scribbled(fd: int, size: int, contents: Contents) -> Iterator[Scribbled]:
    """Put the first content of each tensor into the memory, and let a process exchange it for the
    second and back, from before the block begins until its end. All of the memory is written.
    """
    os.pwrite(fd, FILLING * (size - 8) + bytes(8), 0)
    end = 0

    def put(array: Array) -> int:
        """A copy of the array, a page or more behind the last: its offset."""
        nonlocal end
        offset = end - end % -PAGE + PAGE
        end = offset + array.nbytes
        os.pwrite(fd, array.tobytes(), offset)
        return offset

    places = {name: put(whole) for name, (whole, _) in contents.items()}
    arguments = [str(fd), str(size), str(os.getpid())]
    for name, (whole, spoiled) in contents.items():
        arguments.append(f"{places[name]}:{whole.nbytes}:{put(whole)}:{put(spoiled)}")
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("scribbler.py")), *arguments],
        stdin=subprocess.PIPE,
        pass_fds=[fd],
    ) as scribbler:
        scribbling = Scribbled(places, lambda: int.from_bytes(os.pread(fd, 8, size - 8), "little"))
        until(lambda: scribbling.rounds() > 0)
        yield scribbling
        assert scribbler.poll() is None
        assert scribbler.stdin is not None
        scribbler.stdin.close()
