# SPDX-License-Identifier: Apache-2.0
"""Memory on its way back to the worker, on an event loop: soon, or beside the next packet."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence

from thirdrail.lane.places import Place
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.v1 import lane_pb2

# Arrays that the collector takes are noted without a word to the loop, which looks this often while
# there are any.
COLLECT_INTERVAL_S = 0.1


class Returns:
    """What nobody uses any more of one session's memory.

    send: takes a packet. packet_bytes_max: the largest that it takes.
    on_freed: called when some input memory may be free again.
    """

    def __init__(
        self,
        memory: SessionMemory,
        send: Callable[[bytes], None],
        packet_bytes_max: int,
        on_freed: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._send = send
        self._packet_bytes_max = packet_bytes_max
        self._on_freed = on_freed
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._collecting: asyncio.TimerHandle | None = None
        self._is_flushing = False
        self._is_closed = False

    def leave(self, places: Sequence[Place]) -> None:
        """One user less of each."""
        if places:
            self._memory.leave_all(places)
            self._on_freed()
            self.flush_soon()

    def give_back(self, places: Sequence[Place]) -> None:
        """Of a borrowed result that is released, in any thread."""
        if threading.get_ident() != self._thread or self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it is closed: the session ends with its loop
                self._loop.call_soon_threadsafe(self.give_back, places)
            return
        shown = self._memory.shown
        self.leave([place for place in places if shown.forget(place)])

    def collect(self) -> bool:
        """Give back what arrays showed that are gone. Whether there was any."""
        if not self._memory.collect():
            return False
        self._on_freed()
        self.flush_soon()
        return True

    def settle(self) -> None:
        """Memory was shown, or is to go back."""
        if self._collecting is None and len(self._memory.shown) and not self._is_closed:
            self._collecting = self._loop.call_later(COLLECT_INTERVAL_S, self._on_collect_time)
        self.flush_soon()

    def flush_soon(self) -> None:
        """Behind whoever is woken now: the next request takes what goes back along."""
        if self._is_flushing or not (self._memory.releases or self._memory.drops):
            return
        self._is_flushing = True
        self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what goes back."""
        self._is_flushing = False
        while self._memory.releases and not self._is_closed:
            self._send(self.take(self._packet_bytes_max))
        drops, self._memory.drops = self._memory.drops, []
        for epoch, chunk in drops:
            drop = lane_pb2.DropRequest(epoch=epoch, chunk=chunk)
            self._send(lane_pb2.LaneRequest(drop=drop).SerializeToString())

    def take(self, room: int) -> bytes:
        """Leases to give back beside a packet, in at most `room` bytes."""
        return self._memory.releases.take(room)

    def close(self) -> None:
        """The session has ended: its memory goes with it."""
        self._is_closed = True
        if self._collecting is not None:
            self._collecting.cancel()

    def _on_collect_time(self) -> None:
        self._collecting = None
        self.collect()
        self.settle()
