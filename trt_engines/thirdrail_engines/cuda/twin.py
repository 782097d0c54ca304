# SPDX-License-Identifier: Apache-2.0
"""A device without a GPU: host memory in place of device memory, a thread for each stream.

It obeys the rules of device.py as strictly as a GPU may, and stricter where a GPU would go on by
luck: a copy that leaves its allocation, a freed address, memory freed under running work are
errors. It can be made to fail, and to hold back a stream's work until a test lets it go.
"""

import ctypes
import itertools
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from thirdrail.tensors import Array
from thirdrail_engines.cuda.device import (
    ALIGNMENT_BYTES,
    Capabilities,
    Event,
    Graph,
    MemoryFigures,
    PinnedMemory,
)
from thirdrail_engines.cuda.errors import STICKY, error_of
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.engine import EngineError

Work = Callable[[], None]

TWIN_FACTS = DeviceFacts(
    uuid="GPU-00000000-7477-4969-8e00-000000000000",
    name="a twin: host memory and threads",
    compute_capability=(8, 6),
    memory_bytes=64 << 20,
    driver=(13, 0),
)


class TwinDevice:
    """See Device. capabilities: what it pretends to offer."""

    def __init__(
        self,
        facts: DeviceFacts = TWIN_FACTS,
        capabilities: Capabilities = Capabilities(),  # noqa: B008 - frozen
        pinned_bytes_max: int = 64 << 20,
    ) -> None:
        self._facts = facts
        self._capabilities = capabilities
        self._room = _Room("device", facts.memory_bytes)
        self._pinned = _Room("pinned", pinned_bytes_max)
        self._sticky: str | None = None
        self._next_failures: dict[str, str] = {}
        self._handles = itertools.count(1)
        self._streams: set[TwinStream] = set()

    @property
    def facts(self) -> DeviceFacts:
        return self._facts

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def memory(self) -> MemoryFigures:
        self.enter("cuMemGetInfo")
        return MemoryFigures(self._room.free_bytes, self._room.bytes_max)

    def allocate(self, nbytes: int) -> int:
        self.enter("cuMemAlloc")
        return self._room.take(nbytes, "cuMemAlloc").address

    def free(self, address: int) -> None:
        self.enter("cuMemFree")
        for stream in list(self._streams):  # the driver waits as well
            stream.drain()
        self._room.give_back(address, "cuMemFree")

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        self.enter("cuMemHostAlloc")
        return self._pinned.take(nbytes, "cuMemHostAlloc")

    def free_pinned(self, memory: PinnedMemory) -> None:
        self.enter("cuMemFreeHost")
        self._pinned.give_back(memory.address, "cuMemFreeHost")

    def new_stream(self) -> "TwinStream":
        self.enter("cuStreamCreate")
        stream = TwinStream(self, next(self._handles))
        self._streams.add(stream)
        return stream

    def new_event(self) -> "TwinEvent":
        self.enter("cuEventCreate")
        return TwinEvent(self, next(self._handles))

    def check(self) -> None:
        self.enter("cuMemGetInfo")

    def close(self) -> None:
        """Raises RuntimeError when something was not given back: a GPU would keep it for good."""
        left = [f"{len(self._streams)} streams"] if self._streams else []
        left += [room.leftovers for room in (self._room, self._pinned) if room.leftovers]
        for stream in list(self._streams):
            stream.end()
        if left and self._sticky is None:
            raise RuntimeError(f"a device was closed with {', '.join(left)} in use")

    # For tests and for whoever plays the device

    def fail(self, code: str) -> None:
        """From now on, as after work that went wrong: a sticky code answers every call."""
        assert code in STICKY
        self._sticky = code

    def fail_next(self, call: str, code: str) -> None:
        """The next call of this name answers with the code."""
        self._next_failures[call] = code

    @property
    def is_lost(self) -> bool:
        return self._sticky is not None

    def memory_at(self, address: int, nbytes: int, call: str) -> Array:
        """Device memory as work on the device sees it. Raises CudaError outside of what is
        allocated."""
        return self._room.bytes_at(address, nbytes, call)

    def stream_of(self, handle: int) -> "TwinStream":
        return next(stream for stream in self._streams if stream.handle == handle)

    def enter(self, call: str) -> None:
        """What every call does first. Raises DeviceLost, CudaError."""
        if self._sticky is not None:
            raise error_of(self._sticky, call)
        code = self._next_failures.pop(call, None)
        if code is not None:
            if code in STICKY:
                self._sticky = code
            raise error_of(code, call)

    def forget(self, stream: "TwinStream") -> None:
        self._streams.discard(stream)


class _Room:
    """Allocations by address, and how much they may take together."""

    def __init__(self, what: str, bytes_max: int) -> None:
        self._what = what
        self.bytes_max = bytes_max
        self._taken: dict[int, PinnedMemory] = {}
        self._starts: list[int] = []
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return self.bytes_max - sum(memory.view.nbytes for memory in self._taken.values())

    @property
    def leftovers(self) -> str:
        return f"{len(self._taken)} pieces of {self._what} memory" if self._taken else ""

    def take(self, nbytes: int, call: str) -> PinnedMemory:
        if nbytes < 1:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        if nbytes > self.free_bytes:
            raise error_of("CUDA_ERROR_OUT_OF_MEMORY", call)
        # What was there before is garbage on a GPU as well.
        whole = np.full(nbytes + ALIGNMENT_BYTES, 0xA5, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT_BYTES
        view = whole[start : start + nbytes]
        memory = PinnedMemory(view.ctypes.data, view)
        with self._lock:
            self._taken[memory.address] = memory
            self._starts = sorted(self._taken)
        return memory

    def give_back(self, address: int, call: str) -> None:
        with self._lock:
            memory = self._taken.pop(address, None)
            self._starts = sorted(self._taken)
        if memory is None:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        memory.view[:] = 0x5A  # whoever still reads it is to notice

    def bytes_at(self, address: int, nbytes: int, call: str) -> Array:
        with self._lock:
            index = bisect_right(self._starts, address) - 1
            memory = self._taken[self._starts[index]] if index >= 0 else None
        if memory is None or address + nbytes > memory.address + memory.view.nbytes:
            raise error_of("CUDA_ERROR_INVALID_VALUE", call)
        offset = address - memory.address
        return memory.view[offset : offset + nbytes]


class TwinEvent:
    """See Event."""

    def __init__(self, device: TwinDevice, handle: int) -> None:
        self._device = device
        self._handle = handle
        self.last_record: threading.Event | None = None

    @property
    def handle(self) -> int:
        return self._handle

    def is_done(self) -> bool:
        self._device.enter("cuEventQuery")
        record = self.last_record
        is_done = record is None or record.is_set()
        self._device.enter("cuEventQuery")
        return is_done

    def wait(self) -> None:
        self._device.enter("cuEventSynchronize")
        if self.last_record is not None:
            self.last_record.wait()
        self._device.enter("cuEventSynchronize")

    def close(self) -> None:
        self._device.enter("cuEventDestroy")


@dataclass(slots=True, eq=False)
class TwinGraph:
    """See Graph."""

    work: list[Work] = field(default_factory=list)
    is_closed: bool = False

    def close(self) -> None:
        assert not self.is_closed, "a graph was closed twice"
        self.is_closed = True


class TwinStream:
    """See Stream. Its thread ends with it."""

    def __init__(self, device: TwinDevice, handle: int) -> None:
        self._device = device
        self._handle = handle
        self._work: queue.SimpleQueue[Work | threading.Event | None] = queue.SimpleQueue()
        self._gate = threading.Event()
        self._gate.set()
        self._capture: TwinGraph | None = None
        self._thread = threading.Thread(target=self._run, name=f"twin stream {handle}", daemon=True)
        self._thread.start()

    @property
    def handle(self) -> int:
        return self._handle

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        call = "cuMemcpyHtoDAsync"
        self._device.enter(call)
        memory = self._device.memory_at(target, nbytes, call)
        self.give(lambda: _move(memory.ctypes.data, source, nbytes))

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        call = "cuMemcpyDtoHAsync"
        self._device.enter(call)
        memory = self._device.memory_at(source, nbytes, call)
        self.give(lambda: _move(target, memory.ctypes.data, nbytes))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        call = "cuMemcpyDtoDAsync"
        self._device.enter(call)
        to = self._device.memory_at(target, nbytes, call)
        of = self._device.memory_at(source, nbytes, call)
        self.give(lambda: _move(to.ctypes.data, of.ctypes.data, nbytes))

    def fill(self, target: int, nbytes: int, value: int = 0) -> None:
        call = "cuMemsetD8Async"
        self._device.enter(call)
        memory = self._device.memory_at(target, nbytes, call)
        self.give(lambda: memory.fill(value))

    def record(self, event: Event) -> None:
        assert isinstance(event, TwinEvent)
        self._device.enter("cuEventRecord")
        assert self._capture is None, "events are no part of what we capture"
        event.last_record = threading.Event()
        self._work.put(event.last_record)

    def wait(self, event: Event) -> None:
        assert isinstance(event, TwinEvent)
        self._device.enter("cuStreamWaitEvent")
        record = event.last_record
        if record is not None:
            self.give(lambda: _wait_for(record, self._device))

    def begin_capture(self) -> None:
        self._device.enter("cuStreamBeginCapture")
        assert self._capture is None, "a capture within a capture"
        self._capture = TwinGraph()

    def end_capture(self) -> TwinGraph:
        graph, self._capture = self._capture, None
        assert graph is not None, "no capture to end"
        self._device.enter("cuStreamEndCapture")
        return graph

    def launch(self, graph: Graph) -> None:
        assert isinstance(graph, TwinGraph)
        self._device.enter("cuGraphLaunch")
        assert not graph.is_closed, "a closed graph was launched"
        for work in graph.work:
            self.give(work)

    def synchronize(self) -> None:
        self._device.enter("cuStreamSynchronize")
        self.drain()
        self._device.enter("cuStreamSynchronize")

    def close(self) -> None:
        self._device.enter("cuStreamDestroy")
        self.end()

    # For tests and for whoever plays the device

    def give(self, work: Work) -> None:
        """Work of the device: a copy, a kernel. An EngineError of it is an illegal access, and so
        makes the device fail."""
        if self._capture is not None:
            self._capture.work.append(work)
        else:
            self._work.put(work)

    @property
    def is_capturing(self) -> bool:
        return self._capture is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing that was given and has not begun is done in here."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def drain(self) -> None:
        """Wait until all work given so far is done."""
        done = threading.Event()
        self._work.put(done)
        while not done.wait(0.1):
            if not self._thread.is_alive():
                return

    def end(self) -> None:
        self._work.put(None)
        self._gate.set()
        self._thread.join()
        self._device.forget(self)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._gate.wait()
            if isinstance(work, threading.Event):
                work.set()  # also after a failure: nobody waits for ever
            elif not self._device.is_lost:
                self._do(work)

    def _do(self, work: Work) -> None:
        try:
            work()
        except EngineError:
            self._device.fail("CUDA_ERROR_ILLEGAL_ADDRESS")


def _wait_for(record: threading.Event, device: TwinDevice) -> None:
    while not record.wait(0.05):
        if device.is_lost:
            return


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)
