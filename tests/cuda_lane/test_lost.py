# SPDX-License-Identifier: Apache-2.0
"""A device that is lost where no run is: when memory is asked for."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from thirdrail.lane.memory import create_chunk
from thirdrail.lane.outbox import Outbox
from thirdrail.v1 import lane_pb2
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.engine import DeviceLost
from thirdrail_server.config import DeviceLimits, ExportLimits, LaneLimits, SessionLimits
from thirdrail_server.worker.arena_ledger import ArenaLedger
from thirdrail_server.worker.chunks import charge_nothing
from thirdrail_server.worker.export_desk import ExportDesk
from thirdrail_server.worker.janitor import Janitor
from thirdrail_server.worker.session_device import SessionDevice
from thirdrail_server.worker.session_memory import SessionMemory

WAIT_S_MAX = 20


@pytest.fixture
def twin() -> Iterator[TwinDevice]:
    device = TwinDevice()
    yield device
    device.fail("CUDA_ERROR_ILLEGAL_ADDRESS")  # what it still holds is gone with it
    device.close()


@pytest.fixture
def device(twin: TwinDevice) -> SessionDevice:
    return SessionDevice(twin, twin.new_stream(), DeviceLimits(places_max=2), charge_nothing)


@contextmanager
def memory_of(device: SessionDevice) -> Iterator[SessionMemory]:
    """Of a session that has asked for the device."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        outbox = Outbox(ours, asyncio.get_running_loop(), packets_max=8, fail=pytest.fail)
        desk = ExportDesk(ExportLimits(), Janitor(), lambda number, message: None)
        ledger = ArenaLedger(SessionLimits())
        made = SessionMemory(outbox, LaneLimits(), ledger, create_chunk, desk)
        made.device = device
        yield made


async def test_memory_that_is_asked_for_shows_that_the_device_is_lost(
    device: SessionDevice, twin: TwinDevice
) -> None:
    lost: asyncio.Future[DeviceLost] = asyncio.get_running_loop().create_future()
    twin.fail("CUDA_ERROR_ILLEGAL_ADDRESS")
    request = lane_pb2.GrowRequest(size=1, on_device=True)
    with memory_of(device) as memory:
        memory.grow(request, lambda mappings: None, lost.set_result)
        async with asyncio.timeout(WAIT_S_MAX):
            assert "illegal address" in str(await lost)
