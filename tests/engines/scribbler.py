# SPDX-License-Identifier: Apache-2.0
"""A client that never stops writing to its inputs: a process of its own, given a memfd.

Arguments: fd, its size, then for each tensor offset:size:lowest byte:highest byte. It spoils one
byte after the other and puts each back, so that the tensors are as they were about half of the
time. The last eight bytes of the memory count the rounds. It ends with its standard input.
"""

import mmap
import random
import select
import sys


def main() -> None:
    fd, size = int(sys.argv[1]), int(sys.argv[2])
    memory = mmap.mmap(fd, size)
    tensors = [tuple(map(int, argument.split(":"))) for argument in sys.argv[3:]]
    rounds = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(1000):
            offset, length, low, high = random.choice(tensors)
            place = offset + random.randrange(length)
            whole = memory[place]
            memory[place] = random.randint(low, high)
            memory[place] = whole
            rounds += 1
            memory[-8:] = rounds.to_bytes(8, "little")


if __name__ == "__main__":
    main()
