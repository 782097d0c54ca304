# SPDX-License-Identifier: Apache-2.0
"""Results that go to memory of others on a twin, from an engine that computes there: by copies on
the device, alone or among others of a batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from engines.conftest import inspector
from support.cuda_regions import DeviceMemory
from support.sessions import Session
from support.twin_runs import compute_stream
from thirdrail.errors import Internal, InvalidArgument
from thirdrail.tensors import Array
from thirdrail.v1.tensor_pb2 import RegionRef
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_server.worker.device_regions import DeviceRegions, RegionPart
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.members import Member
from thirdrail_server.worker.version_spec import VersionSpec
from worker.test_device_batches import device, engine, memory, regions, spec

__all__ = ["device", "engine", "inspector", "memory", "regions", "spec"]

OpenSession = Callable[[], Session]
OFFSET = 4  # not where a device would want it


def into_region(
    session: Session, spec: VersionSpec, regions: DeviceRegions, a: Array, size: int = 0
) -> Member:
    """A request whose result goes to region 1."""
    member = session.member(spec, {"a": a})
    part = regions.part(RegionRef(region=1, offset=OFFSET, size=size or a.nbytes))
    (output,) = member.request.outputs
    member.request.outputs = (replace(output, region=part),)
    return member


def rows(count: int) -> Array:
    return np.arange(4 * count, dtype=np.float32).reshape(count, 4)


@pytest.mark.parametrize("others", [0, 2])
def test_results_are_copied_within_the_device(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
    monkeypatch: pytest.MonkeyPatch,
    others: int,
) -> None:
    """They are there when the run is over, and nothing else of the memory is touched."""
    monkeypatch.delattr(RegionPart, "write")
    memory.write(b"\x07" * 4096)
    sessions = [open_session() for _ in range(others)]
    members = [session.member(spec, {"a": rows(1) + 50}) for session in sessions]
    members.insert(others // 2, into_region(open_session(), spec, regions, rows(3)))
    outcomes = execute(engine, spec, members).outcomes
    mine = outcomes.pop(others // 2)
    assert (mine.error, mine.copies) == (None, 1)
    (c,) = mine.outputs
    assert list(c.shape) == [3, 4]
    assert c.WhichOneof("data") is None
    content = np.frombuffer(memory.read(48, OFFSET), np.float32).reshape(3, 4)
    assert content.tolist() == (rows(3) + 1).tolist()
    assert set(memory.read(OFFSET) + memory.read(4096 - 48 - OFFSET, 48 + OFFSET)) == {7}
    for session, outcome in zip(sessions, outcomes, strict=True):
        assert session.arrays(outcome)["c"].tolist() == (rows(1) + 51).tolist()


@pytest.mark.parametrize("fault", ["too small", "gone"])
@pytest.mark.parametrize("others", [0, 1])
def test_a_region_without_room_is_its_owners_fault_alone(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
    fault: str,
    others: int,
) -> None:
    session = open_session()
    members = [
        into_region(open_session(), spec, regions, rows(2), size=31 if "small" in fault else 0)
    ]
    members += [session.member(spec, {"a": rows(1)}) for _ in range(others)]
    if fault == "gone":
        regions.close(1)
    execution = execute(engine, spec, members)
    bad, *good = execution.outcomes
    assert isinstance(bad.error, Internal if fault == "too small" else InvalidArgument)
    assert (execution.is_one_run, execution.has_failed) == (True, False)
    for outcome in good:
        assert session.arrays(outcome)["c"].tolist() == (rows(1) + 1).tolist()


def test_memory_is_held_until_its_results_are_there(
    engine: CudaEngine,
    spec: VersionSpec,
    device: TwinDevice,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is unregistered when the device is about to write it."""
    member = into_region(open_session(), spec, regions, rows(1))
    check_room = RegionPart.check_room

    def check_and_close_later(part: RegionPart, output: str, nbytes: int) -> None:
        check_room(part, output, nbytes)
        compute_stream(engine).give(lambda: regions.close(1))

    monkeypatch.setattr(RegionPart, "check_room", check_and_close_later)
    (outcome,) = execute(engine, spec, [member]).outcomes
    assert outcome.error is None
    assert np.frombuffer(memory.read(16, OFFSET), np.float32).tolist() == (rows(1) + 1)[0].tolist()
    assert not device.is_lost
    assert len(regions) == 0


def test_who_asks_for_them_is_answered_when_they_are_there(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
) -> None:
    """Also where nothing is on the host: as KServe has it, no event tells."""
    member = into_region(open_session(), spec, regions, rows(1))
    room = np.full((1, 4), np.nan, np.float32)
    member.request.inputs = {"a": room}
    member.request.fetches = ((regions.part(RegionRef(region=1, offset=1024, size=16)), room),)
    memory.write(rows(1).tobytes(), 1024)
    with ThreadPoolExecutor(1) as pool:
        with compute_stream(engine).held():
            run = pool.submit(execute, engine, spec, [member])
            with pytest.raises(TimeoutError):
                run.result(0.05)
        (outcome,) = run.result(30).outcomes
    assert outcome.error is None
    assert np.frombuffer(memory.read(16, OFFSET), np.float32).tolist() == (rows(1) + 1)[0].tolist()
