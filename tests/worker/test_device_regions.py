# SPDX-License-Identifier: Apache-2.0
"""Memory of others that a worker opens on its device, on a twin."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from support.cuda_regions import DeviceMemory
from thirdrail.errors import Internal, InvalidArgument, NotFound, Unavailable
from thirdrail.v1.tensor_pb2 import RegionRef
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda.twin_peer_memory import TwinPeerMemory
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_server.config import WorkerConfig
from thirdrail_server.worker.device_regions import DeviceRegions
from thirdrail_server.worker.models import ModelTable
from thirdrail_server.worker.sessions import SessionTable

PAGE = 4096


@pytest.fixture
def device() -> Iterator[TwinDevice]:
    twin = TwinDevice()
    yield twin
    twin.close()  # says what was not given back


@pytest.fixture
def regions(device: TwinDevice) -> Iterator[DeviceRegions]:
    made = DeviceRegions(lambda: device)
    yield made
    made.close_all()
    assert len(made) == 0


def test_bytes_are_read_and_written_at_their_place(regions: DeviceRegions) -> None:
    with DeviceMemory(PAGE) as memory:
        memory.write(b"abcdef")
        regions.open(1, memory.handle, PAGE)
        got = np.zeros(3, np.uint8)
        regions.part(RegionRef(region=1, offset=2, size=3)).read_into(got)
        assert got.tobytes() == b"cde"
        part = regions.part(RegionRef(region=1, offset=PAGE - 8, size=8))
        part.write("y", np.array([1], np.int64))
        assert memory.read(8, PAGE - 8) == np.array([1], np.int64).tobytes()
        with pytest.raises(Internal, match=r"output 'y' \(8 bytes\) should be at least 16 bytes"):
            part.write("y", np.zeros(2, np.int64))
        regions.close(1)


def test_what_is_outside_or_not_open(regions: DeviceRegions) -> None:
    with DeviceMemory(PAGE) as memory:
        regions.open(1, memory.handle, 100)
        with pytest.raises(InvalidArgument, match="4 bytes at 97 are not within a region of 100"):
            regions.part(RegionRef(region=1, offset=97, size=4))
        with pytest.raises(NotFound, match="region 2 is not open"):
            regions.part(RegionRef(region=2, size=1))
        part = regions.part(RegionRef(region=1, size=1))
        regions.close(1)
        with pytest.raises(InvalidArgument, match="was unregistered meanwhile"):
            part.read_into(np.zeros(1, np.uint8))
        regions.close(1)  # it is closed already


@pytest.mark.parametrize("fault", [EngineError("no such handle"), DeviceLost("it was lost")])
def test_memory_that_cannot_be_closed_fails_no_run(
    regions: DeviceRegions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
) -> None:
    """The run of somebody's batch is the last that holds it. Whose thread it is would end."""
    close = TwinPeerMemory.close

    def close_badly(memory: TwinPeerMemory) -> None:
        close(memory)
        raise fault

    monkeypatch.setattr(TwinPeerMemory, "close", close_badly)
    with DeviceMemory(PAGE) as memory:
        regions.open(1, memory.handle, PAGE)
        with regions.part(RegionRef(region=1, size=1)).held():
            regions.close(1)
    assert str(fault) in caplog.text


def test_a_worker_without_a_device_says_so() -> None:
    def none() -> Any:
        raise BuildError(BuildFault.MISSING, "there is no CUDA device here")

    with pytest.raises(NotFound, match="there is no CUDA device here"):
        DeviceRegions(none).open(1, bytes(64), 1)


def test_a_device_that_is_lost_ends_the_process() -> None:
    device, lost = TwinDevice(), list[DeviceLost]()
    device.fail_next("cuIpcOpenMemHandle", "CUDA_ERROR_ILLEGAL_ADDRESS")

    async def ask() -> None:
        sessions = SessionTable(WorkerConfig(), cast(ModelTable, None), lost.append)
        sessions.regions = DeviceRegions(lambda: device)
        try:
            await sessions.open_region(1, bytes(64), 1)
        finally:
            sessions.close()

    with pytest.raises(Unavailable, match="the device was lost: cuIpcOpenMemHandle"):
        asyncio.run(ask())
    assert len(lost) == 1
    device.close()
