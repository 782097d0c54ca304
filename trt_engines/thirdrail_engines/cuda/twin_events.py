# SPDX-License-Identifier: Apache-2.0
"""A twin's events of two processes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from thirdrail.device.twin import TwinCounters
from thirdrail_engines.cuda.twin_stream import TwinEvent

if TYPE_CHECKING:
    from thirdrail_engines.cuda.twin import TwinDevice

__all__ = ["TwinEvents"]


class TwinEvents:
    """See SharedEvents. The counters of the client's events come first, then those of ours."""

    handles = b""

    def __init__(self, device: "TwinDevice", places: int, numbers: Iterator[int]) -> None:
        self._theirs = TwinCounters.create(2 * places, client_writes=True)
        self._ours = TwinCounters.create(places, client_writes=False)

        def events(counters: TwinCounters, first: int) -> Sequence[TwinEvent]:
            return [
                TwinEvent(device, next(numbers), (counters, first + place))
                for place in range(places)
            ]

        self.in_ready = events(self._theirs, 0)
        self.consumed = events(self._theirs, places)
        self.out_done = events(self._ours, 0)

    def export(self) -> list[int]:
        return [self._theirs.export(), self._ours.export()]

    def close(self) -> None:
        self._theirs.close()
        self._ours.close()
