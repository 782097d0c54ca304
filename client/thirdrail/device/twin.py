# SPDX-License-Identifier: Apache-2.0
"""A twin's memory and events between two processes: what stands in for a GPU's where there is none.

Memory is a sealed memfd. An event is two counters in another one: how often it was recorded, and
which of these records the work before has reached. So, as with CUDA's, an event that was never
recorded counts as done, and a wait means the last record at the time of the call. Whoever records
an event is the only one that writes its counters; those of the server's events are read-only to
the client.
"""

import contextlib
import mmap
import os
import time

import numpy as np

from thirdrail.lane.memory import create_chunk, map_chunk, whole_pages
from thirdrail.tensors import Array

LOOK_S_MIN = 0.00002  # between two looks at an event that is waited for; doubles
LOOK_S_MAX = 0.001
_RECORDED, _DONE = 0, 1  # columns


class TwinMemory:
    """A piece of a twin's memory, mapped here. Whoever has its descriptor can map it as well."""

    def __init__(self, fd: int | None, mapping: mmap.mmap) -> None:
        """Takes both over."""
        self._fd = fd
        self._mapping = mapping
        self.view: Array = np.frombuffer(mapping, np.uint8)
        self.nbytes = len(mapping)
        self.address: int = self.view.__array_interface__["data"][0]

    @classmethod
    def create(cls, nbytes: int) -> "TwinMemory":
        """All zero, of whole pages. Raises OSError where the host has no memory left."""
        return cls(*create_chunk(whole_pages(nbytes), client_writes=True))

    @classmethod
    def open(cls, fd: int, nbytes: int) -> "TwinMemory":
        """The other side's; closes `fd`. Raises ValueError for memory that is not such."""
        return cls(None, map_chunk(fd, nbytes, writable=True))

    def export(self) -> int:
        """A new file descriptor, which the caller sends and closes. For whoever made it."""
        assert self._fd is not None
        return os.dup(self._fd)

    def close(self) -> None:
        """Others' mappings stay, and so does ours while an array lies on it."""
        if self._fd is not None:
            os.close(self._fd)
        del self.view
        with contextlib.suppress(BufferError):  # it goes with the last array
            self._mapping.close()


class TwinCounters:
    """The counters of some events, in memory that one side writes."""

    def __init__(self, fd: int | None, mapping: mmap.mmap, events: int) -> None:
        """Takes both over."""
        self._fd = fd
        self._mapping = mapping
        self._table = np.frombuffer(mapping, np.uint64, 2 * events).reshape(events, 2)

    @classmethod
    def create(cls, events: int, *, client_writes: bool) -> "TwinCounters":
        fd, mapping = create_chunk(whole_pages(16 * events), client_writes=client_writes)
        return cls(fd, mapping, events)

    @classmethod
    def open(cls, fd: int, events: int, *, writable: bool) -> "TwinCounters":
        """The other side's; closes `fd`. Raises ValueError for memory that is not such."""
        return cls(None, map_chunk(fd, whole_pages(16 * events), writable=writable), events)

    def export(self) -> int:
        """See TwinMemory.export."""
        assert self._fd is not None
        return os.dup(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        del self._table
        self._mapping.close()

    def record(self, event: int) -> "TwinRecord":
        """A new record, which is done when somebody sets it."""
        self._table[event, _RECORDED] += np.uint64(1)
        return TwinRecord(self, event, int(self._table[event, _RECORDED]))

    def last_record(self, event: int) -> "TwinRecord | None":
        """None: it was never recorded."""
        number = int(self._table[event, _RECORDED])
        return TwinRecord(self, event, number) if number else None

    def reach(self, event: int, number: int) -> None:
        self._table[event, _DONE] = max(int(self._table[event, _DONE]), number)

    def has_reached(self, event: int, number: int) -> bool:
        return int(self._table[event, _DONE]) >= number


class TwinRecord:
    """One record of an event, with the methods of threading.Event that are needed."""

    def __init__(self, counters: TwinCounters, event: int, number: int) -> None:
        self._counters = counters
        self._event = event
        self._number = number

    def set(self) -> None:
        """The work before it is done."""
        self._counters.reach(self._event, self._number)

    def is_set(self) -> bool:
        return self._counters.has_reached(self._event, self._number)

    def wait(self, timeout: float | None = None) -> bool:
        """timeout: seconds. Whether it is done."""
        ends_s = None if timeout is None else time.monotonic() + timeout
        look_s = LOOK_S_MIN
        while not self.is_set():
            if ends_s is not None and time.monotonic() >= ends_s:
                return False
            time.sleep(look_s)
            look_s = min(2 * look_s, LOOK_S_MAX)
        return True
