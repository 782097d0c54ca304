# SPDX-License-Identifier: Apache-2.0
"""Batches of requests with tensors on the host and on the device, of several sessions, on a twin:
rows go to their owners, a fault is its owner's alone, and nothing is left of any of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.conftest import inspector
from support.device_sessions import DeviceSession
from support.models import add
from support.twins import twin_engine
from thirdrail.tensors import Array
from thirdrail_engines import EngineOptions, Inspector, load
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.engine import Engine
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.members import Member
from thirdrail_server.worker.version_spec import VersionSpec

__all__ = ["inspector"]

OpenSession = Callable[..., DeviceSession]


@pytest.fixture(scope="module")
def twin() -> Iterator[TwinDevice]:
    device = TwinDevice()
    yield device
    device.close()  # says what was not given back


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a + b -> c, of rows of 4 floats."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(add(), path)
    return path


@pytest.fixture(scope="module", params=["there", "elsewhere", "there without pinned memory"])
def engine(
    request: pytest.FixtureRequest, path: Path, twin: TwinDevice, inspector: Inspector
) -> Iterator[Engine]:
    """It computes on the device, or on the CPU."""
    if request.param == "elsewhere":
        made: Engine = load(path, options=EngineOptions(), inspector=inspector).engine
    else:
        pinned = 0 if "without" in request.param else 64 << 20
        made = twin_engine(
            path, twin, inspector, elements_max=4000, staging_bytes_max=pinned, activation_bytes=64
        )
    yield made
    made.close()


@pytest.fixture(scope="module")
def spec(engine: Engine) -> VersionSpec:
    names = engine.spec.positional_inputs
    return VersionSpec(
        "add", 1, {t.name: t for t in engine.spec.inputs}, {t.name: t for t in engine.spec.outputs},
        64, names, {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sessions(twin: TwinDevice) -> Iterator[list[DeviceSession]]:
    made = [DeviceSession(twin) for _ in range(3)]
    yield made
    for session in made:
        session.close()


@pytest.fixture
def open_session(twin: TwinDevice) -> Iterator[OpenSession]:
    sessions: list[DeviceSession] = []

    def open_one(**fields: Any) -> DeviceSession:
        sessions.append(DeviceSession(twin, **fields))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()


@dataclass(frozen=True, slots=True)
class Wish:
    """Where a request has its tensors. Without any on the device it is a host's request."""

    session: int
    rows: int
    a_on_device: bool
    b_on_device: bool
    c_on_device: bool

    @property
    def is_on_host(self) -> bool:
        return not (self.a_on_device or self.b_on_device or self.c_on_device)


def ask(session: DeviceSession, spec: VersionSpec, wish: Wish, a: Array, b: Array) -> Member:
    if wish.is_on_host:
        return session.host.member(spec, {"a": a, "b": b})
    inputs = {"a": (a, wish.a_on_device), "b": (b, wish.b_on_device)}
    return session.member(
        spec,
        {name: array for name, (array, is_there) in inputs.items() if is_there},
        {name: array for name, (array, is_there) in inputs.items() if not is_there},
        ["c"] if wish.c_on_device else [],
    )


ANYWHERE = st.builds(
    Wish, st.integers(0, 2), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans()
)
THERE = Wish(0, 2, a_on_device=True, b_on_device=True, c_on_device=True)
MIXED = Wish(0, 1, a_on_device=False, b_on_device=True, c_on_device=False)
HOST = Wish(0, 1, a_on_device=False, b_on_device=False, c_on_device=False)


def rows_of(number: int, wish: Wish) -> tuple[Array, Array]:
    """a and b of a request, unlike any other's."""
    a = np.arange(4 * wish.rows, dtype=np.float32).reshape(-1, 4) + 100 * number
    return a, np.full_like(a, 1000)


@given(wishes=st.lists(ANYWHERE, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_every_row_answers_its_own(
    engine: Engine, spec: VersionSpec, sessions: list[DeviceSession], wishes: list[Wish]
) -> None:
    owners = [sessions[wish.session] for wish in wishes]
    given_rows = [rows_of(number, wish) for number, wish in enumerate(wishes)]
    members = [
        ask(owner, spec, wish, *rows)
        for owner, wish, rows in zip(owners, wishes, given_rows, strict=True)
    ]
    execution = execute(engine, spec, members)
    assert (execution.is_one_run, execution.has_failed) == (True, False)
    for owner, wish, member, outcome, (a, b) in zip(
        owners, wishes, members, execution.outcomes, given_rows, strict=True
    ):
        assert owner.arrays(outcome)["c"].tolist() == (a + b).tolist()
        assert owner.is_on_device(outcome.outputs[0]) == wish.c_on_device
        if not wish.is_on_host:
            owner.end(member, outcome)
    for session in sessions:
        session.settle()
