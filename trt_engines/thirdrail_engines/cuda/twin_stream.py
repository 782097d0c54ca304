# SPDX-License-Identifier: Apache-2.0
"""The twin's streams, events and graphs. A thread does each stream's work, in order."""

import ctypes
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thirdrail.device.twin import TwinCounters, TwinRecord
from thirdrail_engines.cuda.device import Event, Graph
from thirdrail_engines.engine import EngineError

if TYPE_CHECKING:
    from thirdrail_engines.cuda.twin import TwinDevice

Work = Callable[[], None]
Record = threading.Event | TwinRecord


class TwinEvent:
    """See Event. shared: its counters, and its number there, for an event of two processes."""

    def __init__(
        self, device: "TwinDevice", handle: int, shared: tuple[TwinCounters, int] | None = None
    ) -> None:
        self._device = device
        self._handle = handle
        self._shared = shared
        self._last_record: Record | None = None

    @property
    def handle(self) -> int:
        return self._handle

    @property
    def last_record(self) -> Record | None:
        if self._shared is None:
            return self._last_record
        counters, number = self._shared
        return counters.last_record(number)

    def new_record(self) -> Record:
        """To be set when the work before it is done."""
        if self._shared is not None:
            counters, number = self._shared
            return counters.record(number)
        self._last_record = threading.Event()
        return self._last_record

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

    def __init__(self, device: "TwinDevice", handle: int) -> None:
        self._device = device
        self._handle = handle
        self._work: queue.SimpleQueue[Work | Record | None] = queue.SimpleQueue()
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
        self._work.put(event.new_record())

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
            if isinstance(work, Record):
                work.set()  # also after a failure: nobody waits for ever
            elif not self._device.is_lost:
                self._do(work)

    def _do(self, work: Work) -> None:
        try:
            work()
        except EngineError:
            self._device.fail("CUDA_ERROR_ILLEGAL_ADDRESS")


def _wait_for(record: Record, device: "TwinDevice") -> None:
    while not record.wait(0.05):
        if device.is_lost:
            return


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)
