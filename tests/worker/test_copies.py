# SPDX-License-Identifier: Apache-2.0
"""`copies` tells the truth: the addresses that ONNX Runtime saw, beside those of the slots.

Counted as a response counts them: one for inputs that the engine did not read where the caller put
them, one for results that it did not write where the caller reads them. tests/engines shows that
what ONNX Runtime is handed is what it uses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from support.models import add, constant, identity, model, tensor
from support.sessions import Session
from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.members import Member, Outcome

Prepare = Callable[..., PreparedVersion]

LARGE = 1 << 18  # elements; 1 MiB as FP32
SMALL = 1 << 13  # 32 KiB: a slot, but less than a binding is worth
EXACT = np.arange(LARGE, dtype=np.float32)
BATCHES = "max_batch_size: 8 dynamic_batching {}"


@dataclass(slots=True)
class Seen:
    """Addresses of the last run, by tensor name."""

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    plain, bound = ort.InferenceSession.run, ort.InferenceSession.run_with_iobinding
    bind_input, bind_output = ort.IOBinding.bind_input, ort.IOBinding.bind_output

    def run(self: Any, names: list[str], feed: Mapping[str, Array], *rest: Any) -> Any:
        results = plain(self, names, feed, *rest)
        seen.read = {name: array.ctypes.data for name, array in feed.items()}
        seen.written = {n: r.ctypes.data for n, r in zip(names, results, strict=True)}
        return results

    def note_input(self: Any, name: str, *place: Any) -> None:
        bind_input(self, name, *place)
        seen.read[name] = place[-1]

    def note_output(self: Any, name: str, *place: Any) -> None:
        bind_output(self, name, *place)
        seen.written[name] = 0

    def run_bound(self: Any, binding: Any, *rest: Any) -> None:
        bound(self, binding, *rest)
        values = binding.get_outputs()
        seen.written = {n: v.data_ptr() for n, v in zip(seen.written, values, strict=True)}

    monkeypatch.setattr(ort.InferenceSession, "run", run)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run_bound)
    monkeypatch.setattr(ort.IOBinding, "bind_input", note_input)
    monkeypatch.setattr(ort.IOBinding, "bind_output", note_output)
    return seen


def observed(seen: Seen, session: Session, message: pb.InferRequest, outcome: Outcome) -> int:
    is_in_place = len(read_in_place(seen, session, message)) == len(message.inputs)
    is_written = all(
        tensor.HasField("ref") and seen.written[tensor.name] == session.output_address(tensor.ref)
        for tensor in outcome.outputs
    )
    return (not is_in_place) + (not is_written)


def read_in_place(seen: Seen, session: Session, message: pb.InferRequest) -> set[str]:
    return {
        tensor.name
        for tensor in message.inputs
        if seen.read[tensor.name] == session.input_address(tensor.ref)
    }


def gather(count: int) -> onnx.ModelProto:
    """y = x[index], all of them [count]."""
    node = helper.make_node("Gather", ["x", "index"], ["y"])
    inputs = [tensor("x", "FP32", (count,)), tensor("index", "INT64", (count,))]
    return model([node], inputs, [tensor("y", "FP32", (count,))])


def two_results() -> onnx.ModelProto:
    """small = the first 8 elements of x, large = x + 1."""
    nodes = [
        helper.make_node("Slice", ["x", "start", "end"], ["small"]),
        helper.make_node("Add", ["x", "one"], ["large"]),
    ]
    outputs = [tensor("small", "FP32", (8,)), tensor("large", "FP32", (LARGE,))]
    constants = [
        constant("start", np.array([0])),
        constant("end", np.array([8])),
        constant("one", np.array(1, np.float32)),
    ]
    return model(nodes, [tensor("x", "FP32", (LARGE,))], outputs, constants)


X = {"x": EXACT}
SMALL_X = {"x": EXACT[:SMALL]}
INDEXED = {"x": EXACT, "index": np.arange(LARGE)[::-1].copy()}


@pytest.mark.parametrize(
    ("built", "inputs", "copies"),
    [
        (identity("FP32", (LARGE,)), X, 0),
        (identity("BF16", (SMALL,)), {"x": EXACT[:SMALL].astype("bfloat16")}, 0),
        (gather(LARGE), INDEXED, 1),
        (identity("FP32", ("n",)), X, 1),
        (identity("FP32", (SMALL,)), SMALL_X, 1),
        (gather(SMALL), {"x": EXACT[:SMALL], "index": np.arange(SMALL)}, 2),
        (two_results(), X, 1),
        (identity("FP32", (8,)), {"x": EXACT[:8]}, 1),
    ],
    ids=[
        "nothing: known shape, large",
        "nothing: BF16 is bound whatever its size",
        "an input that is no position",
        "a result of open shape",
        "a small result that has a slot",
        "an input and a small result",
        "one result of two",
        "a result inside the message",
    ],
)
def test_a_request_alone(
    prepare_model: Prepare,
    session: Session,
    seen: Seen,
    built: onnx.ModelProto,
    inputs: Mapping[str, Array],
    copies: int,
) -> None:
    prepared = prepare_model(built)
    message = session.message(inputs, form="ref")
    member = session.member_of(prepared.spec, message)
    (outcome,) = execute(prepared.engine, prepared.spec, [member]).outcomes
    assert outcome.error is None
    assert observed(seen, session, message, outcome) == outcome.copies == copies
    assert read_in_place(seen, session, message) == prepared.spec.positional_inputs
    results = session.arrays(outcome)
    for name in results.keys() & {"y"}:
        expected = inputs["x"][inputs["index"]] if "index" in inputs else inputs["x"]
        assert np.array_equal(results[name], expected)


def test_a_batch_is_gathered_and_its_results_are_scattered(
    prepare_model: Prepare, session: Session, seen: Seen
) -> None:
    prepared = prepare_model(add(1, width=LARGE), BATCHES)
    rows = [EXACT.reshape(1, -1) + number for number in range(3)]
    messages = [session.message({"a": row}, form="ref") for row in rows]
    members = [session.member_of(prepared.spec, message) for message in messages]
    outcomes = execute(prepared.engine, prepared.spec, members).outcomes
    for message, outcome, row in zip(messages, outcomes, rows, strict=True):
        assert observed(seen, session, message, outcome) == outcome.copies == 2
        assert np.array_equal(session.arrays(outcome)["c"], row + 1)


def test_a_single_request_of_a_batching_model_is_not_copied(
    prepare_model: Prepare, session: Session, seen: Seen
) -> None:
    prepared = prepare_model(add(1, width=LARGE), BATCHES)
    message = session.message({"a": EXACT.reshape(1, -1)}, form="ref")
    member: Member = session.member_of(prepared.spec, message)
    (outcome,) = execute(prepared.engine, prepared.spec, [member]).outcomes
    assert observed(seen, session, message, outcome) == outcome.copies == 0
