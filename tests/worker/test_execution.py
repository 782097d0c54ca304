# SPDX-License-Identifier: Apache-2.0
"""One run for one batch: everybody gets his rows or his own error, and every slot comes back."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import CLASSIFIER_CONFIG, add, classifier, constant, identity, model, tensor
from support.sessions import Session
from thirdrail.dtypes import object_array
from thirdrail.errors import (
    Cancelled,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    ThirdrailError,
    Unavailable,
)
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_engines.engine import DeviceLost, EngineError, EngineSpec
from thirdrail_server.worker import classification
from thirdrail_server.worker.execution import Execution, execute
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.members import Outcome
from thirdrail_server.worker.output_arena import OutputArena

Prepare = Callable[..., PreparedVersion]
OpenSession = Callable[..., Session]

BATCHES = "max_batch_size: 8 dynamic_batching {}"
WIDE = 1 << 18  # elements; a row of 1 MiB, which never fits a message


def rows_of(*values: float, width: int = 4) -> Array:
    return np.repeat(np.array(values, np.float32), width).reshape(-1, width)


def run(
    prepared: PreparedVersion,
    sessions: Sequence[Session],
    inputs: Sequence[Mapping[str, Array]],
    outputs: Sequence[pb.RequestedOutput] = (),
) -> Execution:
    """A batch of one request of each session."""
    members = [
        session.member(prepared.spec, given, outputs=outputs)
        for session, given in zip(sessions, inputs, strict=True)
    ]
    return execute(prepared.engine, prepared.spec, members)


def run_alone(
    prepared: PreparedVersion,
    session: Session,
    inputs: Mapping[str, Array],
    *outputs: pb.RequestedOutput,
) -> Outcome:
    (outcome,) = run(prepared, [session], [inputs], outputs).outcomes
    return outcome


def error_of(outcome: Outcome, kind: type[ThirdrailError]) -> str:
    assert isinstance(outcome.error, kind)
    assert not outcome.outputs
    return outcome.error.message


def settle(sessions: Sequence[Session], outcomes: Sequence[Outcome]) -> None:
    """Everybody gives back what he got: then nothing may be leased any more."""
    for session, outcome in zip(sessions, outcomes, strict=True):
        session.release(outcome)
    for session in sessions:
        assert session.output.leased_bytes == 0
        assert session.output.stale_releases == 0


# Rows


@pytest.mark.parametrize("width", [4, WIDE], ids=["in messages", "in slots"])
def test_every_row_goes_to_its_owner(
    prepare_model: Prepare, open_session: OpenSession, width: int
) -> None:
    prepared = prepare_model(add(1, width=width), BATCHES)
    sessions = [open_session() for _ in range(3)]
    given = [(1.0,), (2.0, 3.0, 4.0), (5.0, 6.0)]
    execution = run(prepared, sessions, [{"a": rows_of(*rows, width=width)} for rows in given])
    for session, outcome, rows in zip(sessions, execution.outcomes, given, strict=True):
        c = session.arrays(outcome)["c"]
        assert c.shape == (len(rows), width)
        assert c[:, 0].tolist() == c[:, -1].tolist() == [row + 1 for row in rows]
    assert execution.is_one_run
    assert execution.compute_ns > 0
    settle(sessions, execution.outcomes)


def sum_and_difference(width: int | str = "w") -> onnx.ModelProto:
    """sum = a + b, difference = a - b, all [n, width]."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
    ]
    shape = ("n", width)
    return model(
        nodes,
        [tensor("a", "FP32", shape), tensor("b", "FP32", shape)],
        [tensor("sum", "FP32", shape), tensor("difference", "FP32", shape)],
    )


def test_batch_mates_may_want_different_outputs(prepare_model: Prepare, session: Session) -> None:
    prepared = prepare_model(sum_and_difference(), BATCHES)
    given = {"a": rows_of(3), "b": rows_of(1)}
    wishes = [["difference"], ["sum", "difference"], []]
    members = [
        session.member(
            prepared.spec, given, outputs=[pb.RequestedOutput(name=name) for name in names]
        )
        for names in wishes
    ]
    outcomes = execute(prepared.engine, prepared.spec, members).outcomes
    arrays = [session.arrays(outcome) for outcome in outcomes]
    assert [list(each) for each in arrays] == [
        ["difference"],
        ["sum", "difference"],
        ["sum", "difference"],
    ]
    assert [each["difference"][0, 0] for each in arrays] == [2, 2, 2]


# Memory


def test_whose_memory_is_full_hurts_nobody_else(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(add(1, width=WIDE), BATCHES)
    sessions = [open_session(), open_session(output=OutputArena(1 << 20)), open_session()]
    held = sessions[1].output.lease(1 << 10)[0]
    outcomes = run(prepared, sessions, [{"a": rows_of(1, width=WIDE)}] * 3).outcomes
    assert "were not released yet" in error_of(outcomes[1], ResourceExhausted)
    for which in (0, 2):
        assert sessions[which].arrays(outcomes[which])["c"][0, -1] == 2
    sessions[1].output.release(held.epoch, held.slot, held.generation)
    settle(sessions, outcomes)


def test_a_session_that_ended_meanwhile_hurts_nobody_else(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(add(1, width=WIDE), BATCHES)
    sessions = [open_session(), open_session()]
    sessions[0].output.close()
    outcomes = run(prepared, sessions, [{"a": rows_of(1, width=WIDE)}] * 2).outcomes
    error_of(outcomes[0], Cancelled)
    assert sessions[1].arrays(outcomes[1])["c"][0, 0] == 2
    settle(sessions, outcomes)


@pytest.mark.parametrize("width", [WIDE, "w"], ids=["before the run", "after the run"])
def test_results_of_which_only_some_fit_leave_nothing_behind(
    prepare_model: Prepare, open_session: OpenSession, width: int | str
) -> None:
    """The first slot had been leased when there was no room for the second."""
    prepared = prepare_model(sum_and_difference(width), BATCHES)
    session = open_session(output=OutputArena(3 << 19))
    given = {"a": rows_of(3, width=WIDE), "b": rows_of(1, width=WIDE)}
    error_of(run_alone(prepared, session, given), ResourceExhausted)
    assert session.output.leased_bytes == 0
    one = run_alone(prepared, session, given, pb.RequestedOutput(name="sum"))
    assert session.arrays(one)["sum"][0, 0] == 4
    settle([session], [one])


def test_a_result_without_room_gives_back_the_slot_that_was_written_in_place(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    nodes = [
        helper.make_node("Expand", ["x", "open_shape"], ["open"]),
        helper.make_node("Add", ["x", "x"], ["known"]),
    ]
    inputs = [tensor("x", "FP32", (WIDE,)), tensor("open_shape", "INT64", (2,))]
    outputs = [tensor("open", "FP32", ("a", "b")), tensor("known", "FP32", (WIDE,))]
    prepared = prepare_model(model(nodes, inputs, outputs))
    session = open_session(output=OutputArena(3 << 19))
    given = {"x": np.ones(WIDE, np.float32), "open_shape": np.array([1, WIDE])}
    error_of(run_alone(prepared, session, given), ResourceExhausted)
    assert session.output.leased_bytes == 0


def test_small_results_share_the_messages_room(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(sum_and_difference(), BATCHES)
    session = open_session(inline_bytes_max=600)
    given = {"a": rows_of(3, width=100), "b": rows_of(1, width=100)}  # 400 bytes each
    outcome = run_alone(prepared, session, given)
    assert [tensor.WhichOneof("data") for tensor in outcome.outputs] == ["raw", "ref"]
    assert session.arrays(outcome)["difference"][0].tolist() == [2] * 100
    settle([session], [outcome])


def test_values_that_are_too_many_for_a_message_go_into_a_slot(
    prepare_model: Prepare, session: Session
) -> None:
    prepared = prepare_model(identity())
    wish = pb.RequestedOutput(name="y", form=pb.OUTPUT_FORM_VALUES)
    few, many = np.arange(4, dtype=np.float32), np.arange(1000, dtype=np.float32)
    inside = run_alone(prepared, session, {"x": few}, wish)
    outside = run_alone(prepared, session, {"x": many}, wish)
    assert list(inside.outputs[0].values.floats) == few.tolist()
    assert outside.outputs[0].HasField("ref")
    assert np.array_equal(session.arrays(outside)["y"], many)
    settle([session, session], [inside, outside])


# Failing runs


def picks() -> onnx.ModelProto:
    """y = table[index] in rows: an index of 4 or more fails the run."""
    table = constant("table", np.array([10, 11, 12, 13], np.float32))
    node = helper.make_node("Gather", ["table", "index"], ["y"])
    shape = ("n", 1)
    inputs = [tensor("index", "INT64", shape)]
    return model([node], inputs, [tensor("y", "FP32", shape)], [table])


def test_a_run_that_fails_hurts_only_whose_elements_made_it_fail(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(picks(), BATCHES)
    sessions = [open_session() for _ in range(3)]
    execution = run(prepared, sessions, [{"index": np.array([[i]])} for i in (1, 9, 3)])
    assert "idx=9 must be within" in error_of(execution.outcomes[1], Internal)
    for which, expected in ((0, 11), (2, 13)):
        outcome = execution.outcomes[which]
        assert sessions[which].arrays(outcome)["y"].tolist() == [[expected]]
        assert outcome.copies == 2  # into the batch that failed; out of its own run
    assert not execution.is_one_run
    settle(sessions, execution.outcomes)


def test_text_that_is_none_is_the_fault_of_who_sent_it(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(identity("BYTES"), BATCHES)
    sessions = [open_session() for _ in range(2)]
    words = [object_array([word], (1,)) for word in (b"good", b"\xff")]
    outcomes = run(prepared, sessions, [{"x": word} for word in words]).outcomes
    assert sessions[0].arrays(outcomes[0])["y"].tolist() == [b"good"]
    assert "not UTF-8" in error_of(outcomes[1], InvalidArgument)


def positives() -> onnx.ModelProto:
    """y = the rows of x that are above 0."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["is_above"]),
        helper.make_node("Reshape", ["is_above", "flat"], ["keep"]),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    constants = [constant("zero", np.array(0, np.float32)), constant("flat", np.array([-1]))]
    return model(nodes, [tensor("x", "FP32", ("n", 1))], [tensor("y", "FP32", ("k", 1))], constants)


def test_a_result_of_other_than_the_batchs_rows_is_a_failed_run(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(positives(), BATCHES)
    sessions = [open_session() for _ in range(2)]
    rows = [{"x": rows_of(-1, 2, width=1)}, {"x": rows_of(3, 4, width=1)}]
    wrong, right = run(prepared, sessions, rows).outcomes
    assert error_of(wrong, Internal) == (
        f"model '{prepared.spec.model}' returned output 'y' of shape [1, 1] for a batch of 2 rows"
    )
    assert sessions[1].arrays(right)["y"].tolist() == [[3], [4]]


@dataclass
class Broken:
    """An engine with a fault that nobody has thought of."""

    spec: EngineSpec

    def run(self, inputs: Any, wanted: Any, into: Any) -> dict[str, Array]:
        raise ZeroDivisionError("a secret of the engine")

    def close(self) -> None:
        pass


def test_an_unexpected_failure_is_logged_and_not_told(
    prepare_model: Prepare, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare_model(add(1, width=WIDE), BATCHES)
    member = session.member(prepared.spec, {"a": rows_of(1, width=WIDE)})
    with caplog.at_level(logging.ERROR):
        (outcome,) = execute(Broken(prepared.engine.spec), prepared.spec, [member]).outcomes
    assert error_of(outcome, Internal) == "internal error; the server's log has it"
    assert "a secret of the engine" in caplog.text
    assert session.output.leased_bytes == 0


@dataclass
class OnLostDevice:
    """An engine whose device has failed for good."""

    spec: EngineSpec
    runs: int = 0
    runs_before: int = 0  # that fail, and leave the device as it is

    def run(self, inputs: Any, wanted: Any, into: Any) -> dict[str, Array]:
        self.runs += 1
        if self.runs <= self.runs_before:
            raise EngineError("this run failed")
        raise DeviceLost("the device was lost: illegal address")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("count", [1, 3])
def test_a_lost_device_is_nobodys_fault_and_is_not_tried_again(
    prepare_model: Prepare, open_session: OpenSession, count: int
) -> None:
    prepared = prepare_model(add(1, width=WIDE), BATCHES)
    engine = OnLostDevice(prepared.engine.spec)
    sessions = [open_session() for _ in range(count)]
    members = [session.member(prepared.spec, {"a": rows_of(1, width=WIDE)}) for session in sessions]
    execution = execute(engine, prepared.spec, members)
    assert engine.runs == 1
    assert str(execution.device_lost) == "the device was lost: illegal address"
    for session, outcome in zip(sessions, execution.outcomes, strict=True):
        assert error_of(outcome, Unavailable) == "the device was lost: illegal address"
        assert session.output.leased_bytes == 0


def test_a_device_that_is_lost_by_a_member_of_a_batch_is_seen(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    """Its batch-mates were run one by one, since nobody knew whose elements made the run fail."""
    prepared = prepare_model(add(1, width=WIDE), BATCHES)
    sessions = [open_session() for _ in range(3)]
    members = [session.member(prepared.spec, {"a": rows_of(1, width=WIDE)}) for session in sessions]
    execution = execute(OnLostDevice(prepared.engine.spec, runs_before=2), prepared.spec, members)
    assert str(execution.device_lost) == "the device was lost: illegal address"
    first, *others = execution.outcomes
    assert error_of(first, Internal) == "this run failed"
    for outcome in others:
        assert error_of(outcome, Unavailable) == "the device was lost: illegal address"


# Classes


def classes(session: Session, outcome: Outcome) -> list[Any]:
    return [[each.decode() for each in row] for row in session.arrays(outcome)["scores"]]


def identity_scores() -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["scores"])
    return model([node], [tensor("x", "FP32", ("n",))], [tensor("scores", "FP32", ("n",))])


def test_the_best_classes_come_as_text_the_first_of_equals_first(
    prepare_model: Prepare, session: Session
) -> None:
    prepared = prepare_model(identity_scores())
    x = np.zeros(100, np.float32)
    x[[17, 60]] = 2.5
    four = pb.RequestedOutput(name="scores", class_count=4)
    outcome = run_alone(prepared, session, {"x": x}, four)
    assert session.arrays(outcome)["scores"].tolist() == [
        b"2.500000:17",
        b"2.500000:60",
        b"0.000000:0",
        b"0.000000:1",
    ]


def test_there_are_never_more_classes_than_elements(
    prepare_model: Prepare, session: Session
) -> None:
    prepared = prepare_model(identity_scores())
    all_of_them = pb.RequestedOutput(name="scores", class_count=2**32 - 1)
    for count in (0, 1, 3):
        outcome = run_alone(prepared, session, {"x": np.zeros(count, np.float32)}, all_of_them)
        assert session.arrays(outcome)["scores"].shape == (count,)


def test_batch_mates_may_want_different_numbers_of_classes(
    prepare_model: Prepare, open_session: OpenSession
) -> None:
    prepared = prepare_model(classifier(), CLASSIFIER_CONFIG, files={"labels.txt": "cat\ndog\n"})
    sessions = [open_session() for _ in range(2)]
    x = np.array([[0.1, 0.9, 0.5]], np.float32)
    members = [
        session.member(
            prepared.spec,
            {"x": x},
            outputs=[pb.RequestedOutput(name="scores", class_count=count)],
        )
        for session, count in zip(sessions, (1, 3), strict=True)
    ]
    first, second = execute(prepared.engine, prepared.spec, members).outcomes
    assert classes(sessions[0], first) == [["0.900000:1:dog"]]
    assert classes(sessions[1], second) == [["0.900000:1:dog", "0.500000:2", "0.100000:0:cat"]]


def test_too_many_classes_are_refused_to_who_asked_for_them(
    prepare_model: Prepare, open_session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "ELEMENTS_MAX", 5)
    prepared = prepare_model(add(0, width=3), BATCHES)
    sessions = [open_session() for _ in range(2)]
    members = [
        session.member(
            prepared.spec,
            {"a": rows_of(*range(rows), width=3)},
            outputs=[pb.RequestedOutput(name="c", class_count=3)],
        )
        for session, rows in zip(sessions, (2, 1), strict=True)
    ]
    many, few = execute(prepared.engine, prepared.spec, members).outcomes
    assert error_of(many, InvalidArgument) == "classification output tensor too large"
    assert few.error is None
