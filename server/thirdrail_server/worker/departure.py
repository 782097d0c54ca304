# SPDX-License-Identifier: Apache-2.0
"""From the end of a lane session until its memory is given back.

Two things have to happen, in any order. Our own runs are done with the memory (the janitor knows).
And the client lets go of it: it sends `Close`, also after a goodbye of ours; or its process ends;
or, where the process cannot be watched, a grace time passes after the socket was closed.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from thirdrail.lane import packets
from thirdrail.v1 import lane_pb2
from thirdrail_server.worker.janitor import Janitor, Mapping
from thirdrail_server.worker.session_states import Event, Life, State

# After a goodbye the client may have been sending for a while; what it sends is not looked at.
LATE_PACKETS_MAX = 4096
PACKETS_PER_WAKEUP_MAX = 64


class Departure:
    """Owns what the session leaves: its socket where that is still open, and its peer's descriptor.

    on_freed: called once, on the loop, when nobody uses the memory any more.
    """

    def __init__(
        self,
        life: Life,
        *,
        pidfd: int | None,
        packet_bytes_max: int,
        grace_s: float,
        on_freed: Callable[[], None],
    ) -> None:
        self._life = life
        self._pidfd = pidfd
        self._packet_bytes_max = packet_bytes_max
        self._grace_s = grace_s
        self._on_freed = on_freed
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._late_packets = 0
        self._grace: asyncio.TimerHandle | None = None

    def begin(
        self, mappings: Sequence[Mapping], janitor: Janitor, sock: socket.socket | None
    ) -> None:
        """sock: where a `Close` may still come from; it is not read for anything else."""
        self._sock = sock
        if self._pidfd is not None and not self._life.has_let_go:
            self._loop.add_reader(self._pidfd, self.let_go)
        if sock is not None and not self._life.has_let_go:
            self._loop.add_reader(sock, self._on_late_packet)
        else:
            self._hang_up()
        janitor.unmap(mappings, self._on_idle)

    def let_go(self) -> None:
        """The client does not use the memory any more."""
        self._advance(Event.LET_GO)

    def _on_idle(self) -> None:
        self._advance(Event.IDLE)

    def _advance(self, event: Event) -> None:
        if self._life.state is State.FREED:
            return
        state = self._life.on(event)
        if self._life.has_let_go:
            self._forget_peer()
        if state is State.FREED:
            self._on_freed()

    def _on_late_packet(self) -> None:
        assert self._sock is not None
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            try:
                packet = packets.receive(self._sock, self._packet_bytes_max)
            except BlockingIOError:
                return None
            except packets.PacketTooLarge:
                packet = b""
            except OSError:
                packet = b""
            if _is_close(packet):
                return self.let_go()
            self._late_packets += 1
            if not packet or self._late_packets > LATE_PACKETS_MAX:
                return self._hang_up()

    def _hang_up(self) -> None:
        self._close_socket()
        if self._pidfd is None and self._grace is None and not self._life.has_let_go:
            self._grace = self._loop.call_later(self._grace_s, self.let_go)

    def _close_socket(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._sock = None

    def _forget_peer(self) -> None:
        self._close_socket()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._grace is not None:
            self._grace.cancel()


def _is_close(packet: bytes) -> bool:
    with contextlib.suppress(DecodeError):
        return lane_pb2.LaneRequest.FromString(packet).WhichOneof("message") == "close"
    return False
