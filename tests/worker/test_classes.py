# SPDX-License-Identifier: Apache-2.0
"""The best classes of a result, as text."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import CLASSIFIER_CONFIG, add, classifier, model, tensor
from support.runs import BATCHES, OpenSession, Prepare, error_of, rows_of, run_alone
from support.sessions import Session
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.worker import classification
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.members import Outcome


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
