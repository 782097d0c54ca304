# SPDX-License-Identifier: Apache-2.0
"""One run for one batch: everybody gets his rows, and every slot comes back."""

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import add, identity, model, tensor
from support.runs import (
    BATCHES,
    WIDE,
    OpenSession,
    Prepare,
    error_of,
    rows_of,
    run,
    run_alone,
    settle,
)
from support.sessions import Session
from thirdrail.errors import Cancelled, ResourceExhausted
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.output_arena import OutputArena

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
