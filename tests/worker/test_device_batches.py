# SPDX-License-Identifier: Apache-2.0
"""Batches of the engine for devices, on a twin: gathered and scattered without a whole on the host,
from arrays and from memory of others on the device.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.conftest import inspector
from support.cuda_regions import DeviceMemory
from support.models import add
from support.sessions import Session
from support.twins import twin_engine
from thirdrail.errors import InvalidArgument
from thirdrail.v1.tensor_pb2 import RegionRef
from thirdrail_engines import Inspector
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_server.worker.device_regions import DeviceRegions, RegionPart
from thirdrail_server.worker.device_tensors import DeviceTensor
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.members import Member
from thirdrail_server.worker.version_spec import VersionSpec

__all__ = ["inspector"]

OpenSession = Callable[[], Session]
PAGE = 4096
ROW = np.arange(4, dtype=np.float32)


@pytest.fixture
def device() -> Iterator[TwinDevice]:
    twin = TwinDevice()
    yield twin
    twin.close()  # says what was not given back


@pytest.fixture(params=[256 << 20, 0], ids=["staged", "without pinned memory"])
def engine(
    request: pytest.FixtureRequest, device: TwinDevice, inspector: Inspector, tmp_path: Path
) -> Iterator[CudaEngine]:
    """a + 1 -> c, of rows of 4 floats."""
    onnx.save(add(1), tmp_path / "model.onnx")
    made = twin_engine(
        tmp_path / "model.onnx",
        device,
        inspector,
        elements_max=4000,
        staging_bytes_max=request.param,
        activation_bytes=64,
    )
    yield made
    made.close()


@pytest.fixture
def spec(engine: CudaEngine) -> VersionSpec:
    names = engine.spec.positional_inputs
    return VersionSpec(
        "add", 1, {t.name: t for t in engine.spec.inputs}, {t.name: t for t in engine.spec.outputs},
        8, names, {},
    )  # fmt: skip


@pytest.fixture
def regions(device: TwinDevice) -> Iterator[DeviceRegions]:
    made = DeviceRegions(lambda: device)
    yield made
    made.close_all()


@pytest.fixture
def memory(regions: DeviceRegions) -> Iterator[DeviceMemory]:
    """Region 1."""
    with DeviceMemory(PAGE) as made:
        regions.open(1, made.handle, PAGE)
        yield made


def test_parts_are_put_together_and_results_are_seen(
    engine: CudaEngine, device: TwinDevice
) -> None:
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    address, stream = device.allocate(48), device.new_stream()
    stream.copy_in(address, x[2:5].ctypes.data, 48)
    stream.synchronize()
    on_device = DeviceTensor(address, x.dtype, (3, 4))
    seen: list[Any] = []

    def receive(results: Mapping[str, Any]) -> None:
        seen.append({name: array.copy() for name, array in results.items()})
        # Results lie in pinned memory, where there is any.
        assert engine.staging_figures.lent_bytes or engine.staging_figures.refused

    for _ in range(4):  # recorded, and launched
        for parts in ([x], [x[:2], on_device, x[5:]], [x[:2], x[2:5], x[5:]], [on_device]):
            engine.run_batch({"a": parts}, ["c"], receive)
            expected = x[2:5] if len(parts) == 1 and parts[0] is on_device else x
            assert (seen[-1]["c"] == expected + 1).all()
    assert engine.staging_figures.lent_bytes == 0
    assert engine.graph_figures[0].launched > 0
    stream.close()
    device.free(address)


def test_what_the_receiver_raises_is_raised_and_nothing_stays_lent(engine: CudaEngine) -> None:
    def receive(results: Mapping[str, Any]) -> None:
        raise KeyError("the receiver's")

    with pytest.raises(KeyError, match="the receiver's"):
        engine.run_batch({"a": [ROW[None], ROW[None]]}, ["c"], receive)
    assert engine.staging_figures.lent_bytes == 0
    assert engine.run({"a": ROW[None]}, ["c"], {})["c"].tolist() == [(ROW + 1).tolist()]


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (np.ones((1, 5), np.float32), r"float32 \[1, 4\] and float32 \[1, 5\]"),
        (np.ones((1, 4), np.float64), r"float32 \[1, 4\] and float64 \[1, 4\]"),
    ],
)
def test_parts_that_do_not_fit_together(engine: CudaEngine, second: Any, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        engine.run_batch({"a": [ROW[None], second]}, ["c"], lambda results: None)


def test_every_row_goes_to_its_owner_in_one_copy_each_way(
    engine: CudaEngine,
    spec: VersionSpec,
    open_session: OpenSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(np, "concatenate")
    sessions = [open_session() for _ in range(3)]
    given = [np.full((rows, 4), 10 * rows, np.float32) for rows in (1, 3, 2)]
    members = [session.member(spec, {"a": a}) for session, a in zip(sessions, given, strict=True)]
    execution = execute(engine, spec, members)
    assert (execution.is_one_run, execution.has_failed) == (True, False)
    for session, outcome, a in zip(sessions, execution.outcomes, given, strict=True):
        assert session.arrays(outcome)["c"].tolist() == (a + 1).tolist()
        assert outcome.copies == 1  # into the message or the slot


def in_region(
    session: Session, spec: VersionSpec, regions: DeviceRegions, offset: int, rows: int
) -> Member:
    """A request whose input is in region 1."""
    member = session.member(spec, {"a": np.zeros((rows, 4), np.float32)})
    part = regions.part(RegionRef(region=1, offset=offset, size=16 * rows))
    room = np.full((rows, 4), np.nan, np.float32)
    member.request.inputs = {"a": room}
    member.request.fetches = ((part, room),)
    return member


@pytest.mark.parametrize("others", [0, 2])
def test_memory_of_others_is_read_on_the_device(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
    monkeypatch: pytest.MonkeyPatch,
    others: int,
) -> None:
    monkeypatch.delattr(RegionPart, "read_into")
    memory.write(np.concatenate([ROW, ROW, ROW]).tobytes())
    session = open_session()
    members = [in_region(session, spec, regions, offset=4, rows=2)]
    members += [open_session().member(spec, {"a": ROW[None]}) for _ in range(others)]
    execution = execute(engine, spec, members)
    expected = np.concatenate([ROW, ROW, ROW])[1:9].reshape(2, 4) + 1
    assert session.arrays(execution.outcomes[0])["c"].tolist() == expected.tolist()
    for outcome in execution.outcomes[1:]:
        assert open_session().arrays(outcome)["c"].tolist() == [(ROW + 1).tolist()]


def test_a_region_that_is_gone_is_its_owners_fault_alone(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
) -> None:
    sessions = [open_session(), open_session()]
    members = [
        in_region(sessions[0], spec, regions, offset=0, rows=1),
        sessions[1].member(spec, {"a": ROW[None]}),
    ]
    regions.close(1)
    execution = execute(engine, spec, members)
    gone, good = execution.outcomes
    assert isinstance(gone.error, InvalidArgument)
    assert session_rows(sessions[1], good) == [(ROW + 1).tolist()]


def session_rows(session: Session, outcome: Any) -> Any:
    return session.arrays(outcome)["c"].tolist()


def test_memory_of_others_is_held_until_the_run_is_over(
    engine: CudaEngine,
    spec: VersionSpec,
    regions: DeviceRegions,
    memory: DeviceMemory,
    open_session: OpenSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is unregistered while the device is about to read it."""
    memory.write(ROW.tobytes())
    session = open_session()
    member = in_region(session, spec, regions, offset=0, rows=1)
    region = regions._regions[1]
    closed: list[int] = []
    seen: list[int] = []
    plain_close = region._memory.close

    def close() -> None:
        closed.append(1)
        plain_close()

    monkeypatch.setattr(region._memory, "close", close)
    program: Any = engine._program
    plain_compute = program.compute

    def compute(feed: Any) -> Any:
        regions.close(1)
        seen.append(len(closed))
        return plain_compute(feed)

    monkeypatch.setattr(program, "compute", compute)
    (outcome,) = execute(engine, spec, [member]).outcomes
    assert session_rows(session, outcome) == [(ROW + 1).tolist()]
    assert (seen, closed) == ([0], [1])


def test_a_lost_device_is_told_for_the_whole_batch(
    spec: VersionSpec, engine: CudaEngine, device: TwinDevice, open_session: OpenSession
) -> None:
    device.fail_next("cuMemcpyHtoDAsync", "CUDA_ERROR_ILLEGAL_ADDRESS")
    members = [open_session().member(spec, {"a": ROW[None]}) for _ in range(2)]
    execution = execute(engine, spec, members)
    assert isinstance(execution.device_lost, DeviceLost)
    assert all(outcome.error is not None for outcome in execution.outcomes)
