# SPDX-License-Identifier: Apache-2.0
"""A twin's memory and events between two processes."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from thirdrail.device.twin import TwinCounters, TwinMemory
from thirdrail_engines.cuda.errors import OutOfDeviceMemory
from thirdrail_engines.cuda.twin import TwinDevice

OTHER = """
import sys
from thirdrail.device.twin import TwinCounters, TwinMemory
memory_fd, nbytes, theirs, ours = map(int, sys.argv[1:])
memory = TwinMemory.open(memory_fd, nbytes)
inputs = TwinCounters.open(theirs, 4, writable=True)
outputs = TwinCounters.open(ours, 2, writable=False)
record = inputs.record(1)  # in_ready of place 1
print("recorded", flush=True)
sys.stdin.readline()
memory.view[:4] = 7
record.set()
done = outputs.last_record(1)
print("done before:", done.is_set(), flush=True)
assert done.wait(20)
print("then", memory.view[4:8].tolist(), flush=True)
try:
    outputs.reach(1, 9)
except ValueError as error:
    print(error)
memory.close()
"""


@pytest.fixture
def device() -> Iterator[TwinDevice]:
    twin = TwinDevice()
    yield twin
    twin.close()


def test_two_processes_share_memory_and_the_order_of_their_work(device: TwinDevice) -> None:
    memory, events, stream = device.share_memory(5), device.share_events(2), device.new_stream()
    assert memory.nbytes == 2 << 20
    assert [each.is_done() for each in events.in_ready[:2]] == [True, True]  # nothing is recorded
    fds = [memory.export(), *events.export()]
    command = [sys.executable, "-c", OTHER]
    command += [str(each) for each in (fds[0], memory.nbytes, *fds[1:])]
    other = subprocess.Popen(
        command, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "recorded\n"
        assert not events.in_ready[1].is_done()
        with stream.held():
            stream.wait(events.in_ready[1])
            stream.copy(memory.address + 4, memory.address, 4)
            stream.record(events.out_done[1])
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "done before: False\n"
            assert not events.out_done[1].is_done()
        assert other.stdout.readline() == "then [7, 7, 7, 7]\n"
        assert other.stdout.readline() == "assignment destination is read-only\n"
        assert other.wait(20) == 0
        assert events.in_ready[1].is_done()
        assert events.out_done[1].is_done()
    finally:
        other.kill()
        other.communicate()
        stream.close()
        events.close()
        memory.close()


def test_shared_memory_counts_and_outlives_its_maker(device: TwinDevice) -> None:
    free = device.memory().free_bytes
    memory = device.share_memory(3 << 20)
    assert device.memory().free_bytes == free - (4 << 20)
    theirs = TwinMemory.open(memory.export(), 4 << 20)
    memory.close()
    assert device.memory().free_bytes == free
    theirs.view[:] = 1
    theirs.close()
    with pytest.raises(OutOfDeviceMemory, match="cuMemCreate"):
        device.share_memory(free + 1)
    assert device.memory().free_bytes == free


def test_what_is_no_such_memory_is_refused() -> None:
    memory = TwinMemory.create(1)
    with pytest.raises(ValueError, match="announced were 8192"):
        TwinMemory.open(memory.export(), 8192)
    with pytest.raises(ValueError, match="announced were 65536"):
        TwinCounters.open(memory.export(), 4096, writable=True)
    memory.close()
