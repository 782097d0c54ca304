# SPDX-License-Identifier: Apache-2.0
"""Output slots on their way back: noted by any thread at any time, sent beside the next packet."""

from collections import deque

from thirdrail.lane.packets import varint
from thirdrail.v1 import lane_pb2

# Keys of fields in the wire format: number << 3 | type.
_RELEASES_KEY = bytes((5 << 3 | 2,))  # of LaneRequest
_EPOCH_KEY, _SLOT_KEY, _GENERATION_KEY = (bytes((number << 3,)) for number in (1, 2, 3))


class Releases:
    """Leases to give back, as they stand in a packet. A deque's own operations need no lock."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self.waiting_bytes = 0  # of memory; a hint, since threads add to it without a lock

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, epoch: int, slot: int, generation: int, size: int) -> None:
        """size: bytes of the slot."""
        lease = (
            _EPOCH_KEY + varint(epoch) + _SLOT_KEY + varint(slot)
            + _GENERATION_KEY + varint(generation)
        )  # fmt: skip
        self._waiting.append(_RELEASES_KEY + varint(len(lease)) + lease)
        self.waiting_bytes += size

    def add_lease(self, lease: lane_pb2.Lease, size: int) -> None:
        self.add(lease.epoch, lease.slot, lease.generation, size)

    def take(self, room: int) -> bytes:
        """As many as fit `room` bytes of a packet."""
        taken: list[bytes] = []
        while self._waiting:
            try:
                release = self._waiting.popleft()
            except IndexError:
                break  # another thread was faster
            if len(release) > room:
                self._waiting.appendleft(release)
                break
            room -= len(release)
            taken.append(release)
        if not self._waiting:
            self.waiting_bytes = 0
        return b"".join(taken)

    def put_back(self, taken: bytes) -> None:
        """They could not be sent."""
        if taken:
            self._waiting.appendleft(taken)
