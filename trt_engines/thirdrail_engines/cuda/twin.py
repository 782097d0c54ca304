# SPDX-License-Identifier: Apache-2.0
"""A device without a GPU: host memory in place of device memory, a thread for each stream.

It obeys the rules of device.py as strictly as a GPU may, and stricter where a GPU would go on by
luck: a copy that leaves its allocation, a freed address, memory freed under running work are
errors. It can be made to fail, and to hold back a stream's work until a test lets it go.
"""

import itertools
import threading

from thirdrail.device.twin import TwinMemory
from thirdrail.tensors import Array
from thirdrail_engines.cuda.activations import Activations
from thirdrail_engines.cuda.device import Capabilities, MemoryFigures, PinnedMemory
from thirdrail_engines.cuda.errors import STICKY, error_of
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.cuda.runs_under_way import RunsUnderWay
from thirdrail_engines.cuda.sharing import chunk_bytes
from thirdrail_engines.cuda.twin_events import TwinEvents
from thirdrail_engines.cuda.twin_memory import Room
from thirdrail_engines.cuda.twin_peer_memory import TwinPeerMemory
from thirdrail_engines.cuda.twin_stream import TwinEvent, TwinStream

__all__ = ["TWIN_FACTS", "TwinDevice", "TwinEvent", "TwinStream"]

TWIN_FACTS = DeviceFacts(
    uuid="GPU-00000000-7477-4969-8e00-000000000000",
    name="a twin: host memory and threads",
    compute_capability=(8, 6),
    memory_bytes=64 << 20,
    driver=(13, 0),
)


GRANULARITY_BYTES = 2 << 20  # of shared memory, as on today's GPUs


class SharedTwinMemory:
    """See SharedMemory."""

    def __init__(self, room: Room, nbytes: int) -> None:
        memory = TwinMemory.create(chunk_bytes(nbytes, GRANULARITY_BYTES))
        try:
            room.adopt(PinnedMemory(memory.address, memory.view), "cuMemCreate")
        except BaseException:
            memory.close()
            raise
        self._room = room
        self._memory = memory
        self.address, self.nbytes = memory.address, memory.nbytes
        self.export = memory.export

    def close(self) -> None:
        self._room.let_go(self.address)
        self._memory.close()


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
        self._room = Room("device", facts.memory_bytes)
        self._pinned = Room("pinned", pinned_bytes_max)
        self._sticky: str | None = None
        self._next_failures: dict[str, str] = {}
        self._handles = itertools.count(1)
        self._entered = threading.local()
        self._streams: set[TwinStream] = set()
        self.activations = Activations(self)
        self.runs = RunsUnderWay()

    @property
    def facts(self) -> DeviceFacts:
        return self._facts

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def make_current(self) -> None:
        self._entered.yes = True

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

    def share_memory(self, nbytes: int) -> SharedTwinMemory:
        self.enter("cuMemCreate")
        return SharedTwinMemory(self._room, nbytes)

    def share_events(self, places: int) -> TwinEvents:
        self.enter("cuIpcGetEventHandle")
        return TwinEvents(self, places, self._handles)

    def open_peer(self, handle: bytes) -> TwinPeerMemory:
        self.enter("cuIpcOpenMemHandle")
        return TwinPeerMemory(self._room, handle)

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
    def is_current(self) -> bool:
        """For the calling thread."""
        return hasattr(self._entered, "yes")

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
        self.make_current()
        if self._sticky is not None:
            raise error_of(self._sticky, call)
        code = self._next_failures.pop(call, None)
        if code is not None:
            if code in STICKY:
                self._sticky = code
            raise error_of(code, call)

    def forget(self, stream: "TwinStream") -> None:
        self._streams.discard(stream)
