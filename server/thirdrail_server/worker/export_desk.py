# SPDX-License-Identifier: Apache-2.0
"""The one place of a worker where its sessions' exports meet, and what time and the janitor do."""

import asyncio
import os
import time
from collections.abc import Callable

from thirdrail.v1 import lane_pb2
from thirdrail_server.config import ExportLimits
from thirdrail_server.worker.chunks import new_epoch
from thirdrail_server.worker.export_charges import OnCharge, charge_nobody
from thirdrail_server.worker.exports import ExportRegistry
from thirdrail_server.worker.janitor import Janitor
from thirdrail_server.worker.tensor_memory import TensorMemory

EXPIRY_S = 1.0  # how long memory may outlive its token; a token itself ends in time


class ExportDesk:
    """Lives on the loop.

    tell: sends to a session, by its number; to none if it has ended.
    on_charge: hears who is charged for exported memory, by number.
    """

    def __init__(
        self,
        limits: ExportLimits,
        janitor: Janitor,
        tell: Callable[[int, lane_pb2.LaneResponse], None],
        on_charge: OnCharge = charge_nobody,
    ) -> None:
        self.registry = ExportRegistry(
            limits, new_epoch=new_epoch, dispose=self.dispose, on_charge=on_charge
        )
        self._janitor = janitor
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._expiry: asyncio.TimerHandle | None = None

    def dispose(self, memory: TensorMemory) -> None:
        """Nobody needs it any more, except a run that may still read it."""
        os.close(memory.fd)  # first, so that its pages are freed by the janitor and not here
        self._janitor.unmap([memory.mapping], lambda: None)

    def watch_offers(self) -> None:
        if self._expiry is None and self.registry.has_offers:
            self._expiry = self._loop.call_later(EXPIRY_S, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self.registry.expire(time.monotonic_ns())
        self.watch_offers()

    def revoke(self, session: int, number: int) -> None:
        for told in self.registry.revoke(session, number):
            revoked = lane_pb2.Revoked(epoch=told.epoch)
            self._tell(told.session, lane_pb2.LaneResponse(revoked=revoked))

    def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
