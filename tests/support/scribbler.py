# SPDX-License-Identifier: Apache-2.0
"""A client that never stops writing to its inputs: a process of its own, given their memory.

Arguments: fd, its size, the parent's process id, then for each tensor place:bytes:whole:spoiled,
the offsets of the tensor and of two contents for it. It writes the one, then the other, for ever.
The last eight bytes of the memory count the rounds. It ends with its standard input, and however
its parent ends: a killed test must not leave something behind that takes a whole core.
"""

import ctypes
import mmap
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    fd, size, parent = map(int, sys.argv[1:4])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    memory = mmap.mmap(fd, size)
    writes: list[tuple[slice, bytes]] = []
    for argument in sys.argv[4:]:
        place, count, *contents = map(int, argument.split(":"))
        writes += [(slice(place, place + count), memory[at : at + count]) for at in contents]
    rounds = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(100):
            for span, content in writes:
                memory[span] = content
            rounds += 1
            memory[-8:] = rounds.to_bytes(8, "little")


if __name__ == "__main__":
    main()
