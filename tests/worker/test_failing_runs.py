# SPDX-License-Identifier: Apache-2.0
"""One run for one batch that fails: everybody gets his own error, and every slot comes back."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import add, constant, identity, model, positives, tensor
from support.runs import BATCHES, WIDE, OpenSession, Prepare, error_of, rows_of, run, settle
from support.sessions import Session
from thirdrail.dtypes import object_array
from thirdrail.errors import Internal, InvalidArgument, Unavailable
from thirdrail.tensors import Array
from thirdrail_engines.engine import DeviceLost, EngineError, EngineSpec
from thirdrail_server.worker.execution import execute


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
    assert "idx=9 must be within" in error_of(execution.outcomes[1], InvalidArgument)
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
