# SPDX-License-Identifier: Apache-2.0
"""Batches of requests with tensors on the host and on the device, of several sessions, on a twin:
rows go to their owners, a fault is its owner's alone, and nothing is left of any of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.conftest import inspector
from support.device_sessions import LIMITS, DeviceSession
from support.models import model, tensor
from support.twin_runs import Node
from support.twins import twin_engine
from thirdrail.errors import ResourceExhausted
from thirdrail.tensors import Array
from thirdrail_engines import EngineOptions, Inspector, load
from thirdrail_engines.cuda import instance
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda_engines import is_cuda
from thirdrail_engines.engine import Engine, EngineError
from thirdrail_server.worker.execution import Execution, execute
from thirdrail_server.worker.members import Member, Outcome
from thirdrail_server.worker.session_device import DeviceCall
from thirdrail_server.worker.version_spec import VersionSpec

__all__ = ["inspector"]


ENGINES = ["there", "there without pinned memory", "there on three streams", "elsewhere"]


@pytest.fixture(scope="module")
def twin() -> Iterator[TwinDevice]:
    device = TwinDevice()
    yield device
    device.close()  # says what was not given back


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a + b -> c and a - b -> d, of rows of 4 floats."""
    nodes = [Node("Add", ["a", "b"], ["c"]), Node("Sub", ["a", "b"], ["d"])]
    inputs, outputs = (
        [tensor(name, "FP32", ("n", 4)) for name in names] for names in (("a", "b"), ("c", "d"))
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(model(nodes, inputs, outputs), path)
    return path


@pytest.fixture(scope="module", params=ENGINES)
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
    with pytest.MonkeyPatch.context() as patch:
        if "three" in request.param:
            patch.setattr(instance, "OVERLAP_BYTES_MIN", 1)
        yield made
    made.close()


@pytest.fixture(scope="module")
def spec(engine: Engine) -> VersionSpec:
    inputs, outputs = (
        {each.name: each for each in tensors}
        for tensors in (engine.spec.inputs, engine.spec.outputs)
    )
    return VersionSpec("sums", 1, inputs, outputs, 64, engine.spec.positional_inputs, {})


@pytest.fixture(scope="module")
def sessions(twin: TwinDevice) -> Iterator[list[DeviceSession]]:
    made = [DeviceSession(twin) for _ in range(3)]
    yield made
    for session in made:
        session.close()


@dataclass(frozen=True, slots=True)
class Wish:
    """on_device: the tensors of a request that are there; without any it is a host's request."""

    session: int
    rows: int
    on_device: frozenset[str]


def ask(session: DeviceSession, spec: VersionSpec, wish: Wish, a: Array, b: Array) -> Member:
    inputs = {"a": a, "b": b}
    if not wish.on_device:
        return session.host.member(spec, inputs)
    return session.member(
        spec,
        {name: array for name, array in inputs.items() if name in wish.on_device},
        {name: array for name, array in inputs.items() if name not in wish.on_device},
        [name for name in spec.outputs if name in wish.on_device],
    )


ANYWHERE = st.builds(
    Wish, st.integers(0, 2), st.integers(1, 3), st.frozensets(st.sampled_from("abcd"))
)
THERE, MIXED, HOST = (Wish(0, 2, frozenset(names)) for names in ("abcd", "bc", ""))


def rows_of(number: int, wish: Wish) -> tuple[Array, Array]:
    """a and b of a request, unlike any other's."""
    a = np.arange(4 * wish.rows, dtype=np.float32).reshape(-1, 4) + 100 * number
    return a, np.full_like(a, 1000)


def answers(session: DeviceSession, outcome: Outcome, a: Array, b: Array) -> None:
    got = session.arrays(outcome)
    assert {name: got[name].tolist() for name in "cd"} == {
        "c": (a + b).tolist(),
        "d": (a - b).tolist(),
    }


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
        answers(owner, outcome, a, b)
        there = {each.name for each in outcome.outputs if owner.is_on_device(each)}
        assert there == wish.on_device & {"c", "d"}
        if wish.on_device:
            owner.end(member, outcome)
    for session in sessions:
        session.settle()


@pytest.mark.parametrize(
    ("wish", "alone", "together"), [(THERE, 0, 2), (MIXED, 2, 3), (HOST, 1, 1)]
)
def test_copies_are_counted(
    engine: Engine,
    spec: VersionSpec,
    sessions: list[DeviceSession],
    wish: Wish,
    alone: int,
    together: int,
) -> None:
    """Of mixed ones: a comes from the host and d goes there."""
    if not is_cuda(engine):  # each way between host and device, and the batch put together
        extra = {THERE: (2, 3), MIXED: (3, 4), HOST: (1, 2)}
        alone, together = extra[wish]
    for count, copies in ((1, alone), (2, together)):
        wishes = [wish, THERE][:count]
        execution = run(engine, spec, sessions, wishes)
        assert execution.outcomes[0].copies == copies


# Faults


def run(
    engine: Engine, spec: VersionSpec, sessions: list[DeviceSession], wishes: Sequence[Wish]
) -> Execution:
    """A batch of one request of each session, which is answered or not, and gone."""
    rows = [rows_of(number, wish) for number, wish in enumerate(wishes)]
    asked = list(zip(sessions, wishes, rows, strict=False))
    members = [ask(session, spec, wish, *of_one) for session, wish, of_one in asked]
    execution = execute(engine, spec, members)
    for (session, wish, of_one), member, outcome in zip(
        asked, members, execution.outcomes, strict=True
    ):
        if outcome.error is None:
            answers(session, outcome, *of_one)
        if wish.on_device:
            session.end(member, outcome)
            del member
            session.settle()
    return execution


def faults(execution: Execution) -> list[bool]:
    return [outcome.error is not None for outcome in execution.outcomes]


@pytest.fixture
def full(sessions: list[DeviceSession]) -> Iterator[DeviceSession]:
    """The second session, without room for results on the device."""
    output = sessions[1].device.output
    output.lease(0, {"everything": LIMITS.output_arena_bytes_max})
    yield sessions[1]
    output.free(0)


def test_without_room_for_results_only_their_owner_fails(
    engine: Engine, spec: VersionSpec, sessions: list[DeviceSession], full: DeviceSession
) -> None:
    execution = run(engine, spec, sessions, [THERE, THERE, HOST])
    assert faults(execution) == [False, True, False]
    assert isinstance(execution.outcomes[1].error, ResourceExhausted)
    assert (execution.is_one_run, execution.has_failed) == (True, False)
    (alone,) = run(engine, spec, [full], [MIXED]).outcomes
    assert isinstance(alone.error, ResourceExhausted)


CALLS = ["cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuMemcpyDtoHAsync"]


@pytest.mark.parametrize("engine", ENGINES[:2], indirect=True)
@pytest.mark.parametrize("call", CALLS)
def test_a_batch_that_fails_is_done_again_one_by_one(
    engine: Engine, spec: VersionSpec, sessions: list[DeviceSession], twin: TwinDevice, call: str
) -> None:
    twin.fail_next(call, "CUDA_ERROR_INVALID_HANDLE")
    execution = run(engine, spec, sessions, [THERE, MIXED, HOST])
    assert (faults(execution), execution.is_one_run) == ([False] * 3, False)
    assert is_cuda(engine)
    assert engine.staging_figures.lent_bytes == 0


def test_what_a_failed_attempt_had_leased_and_recorded_is_used_again(
    engine: Engine,
    spec: VersionSpec,
    sessions: list[DeviceSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second member's end cannot be recorded, when all that is before is done."""
    record_done, places = DeviceCall.record_done, list[int]()

    def fail_once(call: DeviceCall, stream: Stream) -> None:
        places.append(call.place)
        if len(places) == 2:
            raise EngineError("for once")
        record_done(call, stream)

    monkeypatch.setattr(DeviceCall, "record_done", fail_once)
    execution = run(engine, spec, sessions, [THERE, THERE, THERE])
    if is_cuda(engine):
        assert (faults(execution), execution.is_one_run) == ([False] * 3, False)
        assert len(places) == 2 + 3
    else:  # results are written one by one, and a fault there is its owner's
        assert (faults(execution), execution.is_one_run) == ([False, True, False], True)


def test_one_who_always_fails_fails_alone(
    engine: Engine,
    spec: VersionSpec,
    sessions: list[DeviceSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record_done = DeviceCall.record_done

    def fail_one(call: DeviceCall, stream: Stream) -> None:
        if call.output is sessions[1].device.output:
            raise EngineError("always")
        record_done(call, stream)

    monkeypatch.setattr(DeviceCall, "record_done", fail_one)
    execution = run(engine, spec, sessions, [THERE, THERE, MIXED])
    assert faults(execution) == [False, True, False]
    monkeypatch.undo()
    assert faults(run(engine, spec, sessions, [THERE, THERE, MIXED])) == [False] * 3
