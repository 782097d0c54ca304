# SPDX-License-Identifier: Apache-2.0
"""The position rule: which inputs may stay in memory that their owner can still write."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from thirdrail_engines.positions import FOLLOWED, READERS, positional_inputs

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Node = helper.make_node
BuildModel = Callable[..., Any]


def rows() -> Iterator[tuple[str, int]]:
    """Every operator of the tables with every input that they name."""
    for operator, inputs in {**READERS, **FOLLOWED}.items():
        schema = onnx.defs.get_schema(operator)
        for index in range(len(schema.inputs)) if inputs is None else sorted(inputs):
            yield operator, index


@pytest.mark.parametrize(("operator", "index"), list(rows()))
def test_each_row_of_the_tables_is_about_float_data(operator: str, index: int) -> None:
    """Against slips of the pen: the operator exists, and its input there may hold floats."""
    schema = onnx.defs.get_schema(operator)
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    type_name = schema.inputs[index].type_str
    assert "tensor(float)" in constraints.get(type_name, [type_name])


@pytest.mark.parametrize(("operator", "index"), list(rows()))
def test_an_input_used_only_there_is_positional(
    build_model: BuildModel, operator: str, index: int
) -> None:
    assert positional(build_model, [Node(operator, at(index), ["y"])]) == ["x"]


@pytest.mark.parametrize("operator", ["Add", "Relu", "Conv"])
def test_whole_numbers_and_booleans_never_are(build_model: BuildModel, operator: str) -> None:
    for element_type in (INT64, BOOL, TensorProto.STRING, TensorProto.UINT8):
        model = build_model(
            [Node(operator, ["x"], ["y"])], {"x": (element_type, ["n"])}, {"y": (FLOAT, None)}
        )
        assert positional_inputs(model) == []


@pytest.mark.parametrize(
    "element_type",
    [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE],
)
def test_every_float_type_may_be(build_model: BuildModel, element_type: int) -> None:
    model = build_model(
        [Node("Relu", ["x"], ["y"])], {"x": (element_type, ["n"])}, {"y": (element_type, ["n"])}
    )
    assert positional_inputs(model) == ["x"]


@pytest.mark.parametrize(
    ("operator", "index"),
    [
        ("TopK", 0),
        ("Unique", 0),
        ("NonMaxSuppression", 0),
        ("NonMaxSuppression", 1),
        ("GridSample", 0),
        ("GridSample", 1),
        ("RoiAlign", 1),
        ("Resize", 1),
        ("Resize", 2),
        ("Upsample", 1),
        ("Range", 0),
        ("NonZero", 0),
        ("Compress", 0),
        ("Multinomial", 0),
        ("LSTM", 4),
        ("GRU", 4),
        ("Reshape", 1),
        ("Pad", 1),
        ("Where", 0),
        ("Gather", 1),
        ("Dropout", 1),
        ("If", 0),
        ("Loop", 2),
        ("Scan", 0),
        ("SequenceConstruct", 0),
        ("Nope", 0),
    ],
)
def test_inputs_that_are_addresses_or_unreviewed_are_not(
    build_model: BuildModel, operator: str, index: int
) -> None:
    assert positional(build_model, [Node(operator, at(index), ["y"])]) == []


def test_one_bad_use_spoils_the_good_ones(build_model: BuildModel) -> None:
    nodes = [Node("Conv", ["x", "w"], ["a"]), Node("TopK", ["x", "k"], ["y", "i"])]
    assert positional(build_model, nodes) == []
    assert positional(build_model, nodes[:1]) == ["x"]


@pytest.mark.parametrize("passing", ["Identity", "Reshape", "Cast", "Add", "Slice", "Concat"])
def test_what_may_share_memory_is_followed(build_model: BuildModel, passing: str) -> None:
    chain = [Node(passing, ["x", "other"], ["a"]), Node("Squeeze", ["a"], ["b"])]
    assert positional(build_model, [*chain, Node("Neg", ["b"], ["y"])]) == ["x"]
    assert positional(build_model, [*chain, Node("TopK", ["b", "k"], ["y", "i"])]) == []
    assert positional(build_model, [*chain, Node("Gather", ["table", "b"], ["y"])]) == []


def test_what_writes_its_own_memory_ends_the_search(build_model: BuildModel) -> None:
    nodes = [Node("MatMul", ["x", "w"], ["a"]), Node("TopK", ["a", "k"], ["y", "i"])]
    assert positional(build_model, nodes) == ["x"]


def test_every_output_of_a_node_is_followed(build_model: BuildModel) -> None:
    nodes = [Node("Split", ["x"], ["a", "", "y"]), Node("NonZero", ["a"], ["z"])]
    assert positional(build_model, nodes) == []


def test_a_body_that_captures_the_input_or_its_alias_spoils_it(build_model: BuildModel) -> None:
    def branch(captured: str, depth: int) -> Any:
        node = (
            Node("Neg", [captured], ["out"])
            if depth == 0
            else Node("If", ["c"], ["out"], **both(captured, depth - 1))
        )
        out = helper.make_tensor_value_info("out", FLOAT, None)
        return helper.make_graph([node], "branch", [], [out])

    def both(captured: str, depth: int) -> dict[str, Any]:
        return {
            "then_branch": branch(captured, depth),
            "else_branch": branch("elsewhere", depth),
        }

    for depth in (0, 1, 3):
        for captured, expected in (("x", []), ("alias", []), ("elsewhere", ["x"])):
            nodes = [
                Node("Identity", ["x"], ["alias"]),
                Node("If", ["c"], ["y"], **both(captured, depth)),
            ]
            assert positional(build_model, nodes) == expected


def test_a_body_that_returns_the_input_spoils_it(build_model: BuildModel) -> None:
    out = helper.make_tensor_value_info("x", FLOAT, None)
    body = helper.make_graph([], "branch", [], [out])
    nodes = [Node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    assert positional(build_model, nodes) == []


def test_own_operators_and_functions_promise_nothing(build_model: BuildModel) -> None:
    assert positional(build_model, [Node("Relu", ["x"], ["y"], domain="own")]) == []
    assert positional(build_model, [Node("Relu", ["x"], ["y"], domain="ai.onnx")]) == ["x"]
    relu = helper.make_function(
        "", "Relu", ["a"], ["b"], [Node("NonZero", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    assert positional(build_model, [Node("Relu", ["x"], ["y"])], functions=[relu]) == []


def test_an_input_with_a_default_is_not(build_model: BuildModel) -> None:
    nodes = [Node("Add", ["x", "w"], ["y"])]
    default = {"x": np.zeros(2, np.float32)}
    assert positional(build_model, nodes, constants=default) == []


def test_an_input_that_is_a_result_or_unused_is_positional(build_model: BuildModel) -> None:
    model = build_model([], {"x": (FLOAT, ["n"]), "z": (FLOAT, ["n"])}, {"x": (FLOAT, ["n"])})
    assert positional_inputs(model) == ["x", "z"]


def at(index: int) -> list[str]:
    """Names for a node's inputs, x being the one at `index`."""
    return [f"other{i}" for i in range(index)] + ["x"]


def positional(build_model: BuildModel, nodes: Sequence[Any], **more: Any) -> list[str]:
    inputs = {"x": (FLOAT, ["n"]), "c": (BOOL, [])}
    names = positional_inputs(build_model(nodes, inputs, {"y": (FLOAT, None)}, **more))
    return [name for name in names if name == "x"]
