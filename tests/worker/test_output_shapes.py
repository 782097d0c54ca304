# SPDX-License-Identifier: Apache-2.0
"""Results whose shape the declaration leaves open are foretold from earlier runs, and a wrong word
about the future costs a second run but never a wrong answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from support.models import identity, model, tensor
from support.sessions import Session
from thirdrail.tensors import Array
from thirdrail_server.worker import output_shapes
from thirdrail_server.worker.execution import execute
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.members import Outcome
from thirdrail_server.worker.output_shapes import OutputShapes

Prepare = Callable[..., PreparedVersion]

LARGE = np.arange(1 << 18, dtype=np.float32)


def picked() -> onnx.ModelProto:
    """y = the elements of x where mask is true; z = x. How long y is, only the elements say."""
    nodes = [
        helper.make_node("Compress", ["x", "mask"], ["y"]),
        helper.make_node("Identity", ["x"], ["z"]),
    ]
    inputs = [tensor("x", "FP32", ("n",)), tensor("mask", "BOOL", ("n",))]
    return model(nodes, inputs, [tensor("y", "FP32", ("m",)), tensor("z", "FP32", ("n",))])


def run(prepared: PreparedVersion, session: Session, inputs: dict[str, Array]) -> Outcome:
    member = session.member(prepared.spec, inputs)
    execution = execute(prepared.engine, prepared.spec, [member])
    return execution.outcomes[0]


def test_a_shape_that_was_seen_is_written_in_place(
    prepare_model: Prepare, session: Session
) -> None:
    prepared = prepare_model(identity())
    copies = []
    for count in (LARGE.size, LARGE.size, LARGE.size // 2, LARGE.size // 2, LARGE.size):
        data = LARGE[:count]
        outcome = run(prepared, session, {"x": data})
        np.testing.assert_array_equal(session.arrays(outcome)["y"], data)
        copies.append(outcome.copies)
        session.release(outcome)
    assert copies == [1, 0, 1, 0, 0]
    assert session.output.leased_bytes == 0


def test_a_result_that_depends_on_elements_is_right_all_the_same(
    prepare_model: Prepare, session: Session
) -> None:
    prepared = prepare_model(picked())
    copies = []
    for keep in (1, 1, 2, 2, 4, 1):
        mask = np.arange(LARGE.size) % keep == 0
        outcome = run(prepared, session, {"x": LARGE, "mask": mask})
        arrays = session.arrays(outcome)
        np.testing.assert_array_equal(arrays["y"], LARGE[mask])
        np.testing.assert_array_equal(arrays["z"], LARGE)
        copies.append(outcome.copies)
        session.release(outcome)
        assert session.output.leased_bytes == 0, "a slot that did not fit is given back"
    # Foretold once rightly, then found out: y is copied from then on.
    assert copies == [1, 0, 1, 1, 1, 1]


def test_inputs_in_another_order_are_not_taken_for_each_other(
    prepare_model: Prepare, session: Session
) -> None:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("x", "v")]
    inputs = [tensor("x", "FP32", ("n",)), tensor("v", "FP32", ("m",))]
    outputs = [tensor("x_out", "FP32", ("n",)), tensor("v_out", "FP32", ("m",))]
    prepared = prepare_model(model(nodes, inputs, outputs))
    longer, shorter = LARGE, LARGE[: LARGE.size // 2]
    requests = [{"x": longer, "v": shorter}, {"v": longer, "x": shorter}]
    copies = []
    for request in requests * 2:
        outcome = run(prepared, session, request)
        for name, data in request.items():
            np.testing.assert_array_equal(session.arrays(outcome)[f"{name}_out"], data)
        copies.append(outcome.copies)
        session.release(outcome)
    assert copies == [1, 1, 0, 0]


def test_a_fault_of_the_caller_is_told_as_ever(prepare_model: Prepare, session: Session) -> None:
    """The second run fails as well, and what was foretold stays: it was not to blame."""
    table = onnx.numpy_helper.from_array(LARGE, "table")
    node = helper.make_node("Gather", ["table", "index"], ["y"])
    inputs, outputs = [tensor("index", "INT64", ("n",))], [tensor("y", "FP32", ("n",))]
    prepared = prepare_model(model([node], inputs, outputs, [table]))
    good = {"index": np.arange(LARGE.size)}
    session.release(run(prepared, session, good))
    bad = run(prepared, session, {"index": np.full(LARGE.size, LARGE.size)})
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.arrays(bad)
    assert session.output.leased_bytes == 0
    again = run(prepared, session, good)
    np.testing.assert_array_equal(session.arrays(again)["y"], LARGE)
    assert again.copies == 0


def test_what_is_remembered_has_a_bound() -> None:
    shapes = OutputShapes()
    inputs: list[dict[str, Any]] = [
        {"x": np.empty((0, n))} for n in range(output_shapes.INPUT_SHAPES_MAX + 1)
    ]
    for each in inputs:
        shapes.note(each, "y", each["x"].shape)
    assert shapes.foretell(inputs[-2]) == {"y": inputs[-2]["x"].shape}
    assert shapes.foretell(inputs[-1]) == {}
