# SPDX-License-Identifier: Apache-2.0
"""What we ask of a device, whether it is a GPU or its twin.

Rules that both obey. Work of one stream happens in order; work of two happens in any order unless
an event joins them. `Stream.wait` waits for the event's last record at the time of the call, and
an event that was never recorded counts as done. Calls that give work to a stream return before it
is done, and whoever gave it keeps the memory alive until then. An error of the work may come up in
any later call; a sticky one (DeviceLost) comes up in every later call.

All methods may be called from any thread. Blocking ones let other Python threads run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from thirdrail.tensors import Array
from thirdrail_engines.cuda.identity import DeviceFacts

if TYPE_CHECKING:
    from thirdrail_engines.cuda.activations import Activations
    from thirdrail_engines.cuda.runs_under_way import RunsUnderWay

# The driver gives no allocation a smaller alignment (CUDA programming guide: "at least 256 bytes").
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device offers for sharing memory and events with other processes."""

    has_virtual_memory: bool = False  # cuMemCreate and its kin
    has_posix_fds: bool = False  # such memory can be exported as a file descriptor
    has_fabric_handles: bool = False
    has_memory_pools: bool = False
    has_pool_posix_fds: bool = False  # a pool can be exported as a file descriptor
    has_ipc_events: bool = False
    can_register_host: bool = False
    can_register_host_read_only: bool = False
    has_host_pools: bool = False
    is_integrated: bool = False  # it shares the host's memory: Jetson and its like


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class PinnedMemory:
    """Host memory that the device reads and writes by itself."""

    address: int
    view: Array  # its bytes, valid until it is freed


class Event(Protocol):
    @property
    def handle(self) -> int: ...

    def is_done(self) -> bool:
        """Whether all work before the last record is done. Raises DeviceLost, CudaError."""
        ...

    def wait(self) -> None:
        """Block this thread until it is. Raises DeviceLost, CudaError."""
        ...

    def close(self) -> None: ...


class Graph(Protocol):
    """Work that was recorded once, to be done as often as wanted."""

    def close(self) -> None:
        """It must not be under way."""
        ...


class Stream(Protocol):
    """Raises, from every method: DeviceLost, CudaError."""

    @property
    def handle(self) -> int: ...

    def copy_in(self, target: int, source: int, nbytes: int) -> None:
        """From host memory. From memory that is not pinned, it may block until it was read."""
        ...

    def copy_out(self, target: int, source: int, nbytes: int) -> None:
        """To host memory. To memory that is not pinned, it may block until it is done."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Within the device."""
        ...

    def fill(self, target: int, nbytes: int, value: int = 0) -> None: ...

    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None: ...

    def begin_capture(self) -> None:
        """From here to `end_capture`, work is recorded and not done. One thread does both."""
        ...

    def end_capture(self) -> Graph: ...

    def launch(self, graph: Graph) -> None: ...

    def synchronize(self) -> None:
        """Block this thread until all work given so far is done."""
        ...

    def close(self) -> None: ...


class SharedMemory(Protocol):
    """Device memory that other processes can map, by a file descriptor."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def export(self) -> int:
        """A new file descriptor, which the caller sends and closes."""
        ...

    def close(self) -> None:
        """No work of this process may use it any more. Others' mappings stay."""
        ...


class SharedEvents(Protocol):
    """Triples of events for another process and this one, by place; see event_ring.py.

    The other process can record all of them where they are a GPU's: what this process relies on,
    it learns from events of its own.
    """

    @property
    def in_ready(self) -> Sequence[Event]:
        """Recorded by the other process."""
        ...

    @property
    def out_done(self) -> Sequence[Event]: ...

    @property
    def consumed(self) -> Sequence[Event]:
        """Recorded by the other process."""
        ...

    @property
    def handles(self) -> bytes:
        """What the other process opens them by: of 64 bytes each, in the order above; none where
        descriptors say all."""
        ...

    def export(self) -> list[int]:
        """New file descriptors that go with the handles, which the caller sends and closes."""
        ...

    def close(self) -> None: ...


class PeerMemory(Protocol):
    """Device memory that another process allocated, mapped here."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """To the end of what was allocated."""
        ...

    def close(self) -> None:
        """No work of this process may use it any more."""
        ...


class Device(Protocol):
    @property
    def facts(self) -> DeviceFacts: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def activations(self) -> "Activations":
        """What all engines of this process on it compute in."""
        ...

    @property
    def runs(self) -> "RunsUnderWay":
        """Of all engines of this process on it."""
        ...

    def make_current(self) -> None:
        """For the calling thread, as every other method does: whoever uses the device from it by
        another library relies on that. Takes no time from the second call on."""
        ...

    def memory(self) -> MemoryFigures:
        """As the driver sees it now, other processes counted."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory of at least one byte. Raises OutOfDeviceMemory."""
        ...

    def free(self, address: int) -> None:
        """No work may use it any more. It may block until the device is idle."""
        ...

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Raises OutOfDeviceMemory."""
        ...

    def free_pinned(self, memory: PinnedMemory) -> None: ...

    def new_stream(self) -> Stream: ...

    def new_event(self) -> Event: ...

    def share_memory(self, nbytes: int) -> SharedMemory:
        """At least so many bytes, all zero. Raises OutOfDeviceMemory, CudaError, DeviceLost."""
        ...

    def share_events(self, places: int) -> SharedEvents:
        """Raises CudaError, DeviceLost."""
        ...

    def open_peer(self, handle: bytes) -> PeerMemory:
        """What a handle of 64 bytes names. Raises CudaError for one that names nothing here,
        DeviceLost."""
        ...

    def check(self) -> None:
        """Raises DeviceLost if the device is. Returns at once otherwise."""
        ...

    def close(self) -> None:
        """Everything that came from it is closed or freed before."""
        ...
