# SPDX-License-Identifier: Apache-2.0
"""Whether the shapes of a graph's inputs alone decide how much it has to do."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from thirdrail_engines.amounts import DECIDE, REFUSED, VERSIONS_MAX, sized_by_shapes

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Node = helper.make_node
BuildModel = Callable[..., Any]

INPUTS = {"x": (FLOAT, ["n"]), "k": (INT64, ["m"]), "c": (BOOL, [])}
CONSTANTS = {"two": np.array([2], np.int64), "half": np.array([0.5], np.float32)}


def holds(build_model: BuildModel, *nodes: Any) -> bool:
    model = build_model(nodes, INPUTS, {"y": (FLOAT, None)}, CONSTANTS)
    return sized_by_shapes(model)


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("Mul", ["x", "half"], ["y"])],
        [Node("Gather", ["x", "k"], ["y"])],
        [Node("NonZero", ["x"], ["y"])],
        [Node("TopK", ["x", "k"], ["y", "where"])],
        [Node("Tile", ["x", "two"], ["y"])],
        [Node("Shape", ["x"], ["s"]), Node("Expand", ["half", "s"], ["y"])],
        [
            Node("NonZero", ["x"], ["where"]),
            Node("Shape", ["where"], ["s"]),
            Node("Mul", ["s", "two"], ["twice"]),
            Node("ConstantOfShape", ["twice"], ["y"]),
        ],
        [Node("Pad", ["x", "two", "half", "k"], ["y"])],
        [Node("Normalizer", ["x"], ["y"], domain="ai.onnx.ml")],
    ],
    ids=lambda nodes: " ".join(node.op_type for node in nodes),
)
def test_shapes_decide(build_model: BuildModel, nodes: list[Any]) -> None:
    assert holds(build_model, *nodes)


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("Expand", ["half", "k"], ["y"])],
        [Node("Range", ["two", "k", "two"], ["y"])],
        [Node("Mul", ["k", "two"], ["more"]), Node("ConstantOfShape", ["more"], ["y"])],
        [Node("Cast", ["x"], ["k2"], to=INT64), Node("Tile", ["half", "k2"], ["y"])],
        [Node("RoiAlign", ["x", "half", "two"], ["y"])],
        [Node("Mystery", ["x"], ["y"], domain="own")],
        [Node("Relu", ["later"], ["y"]), Node("Relu", ["x"], ["later"])],
    ],
    ids=lambda nodes: " ".join(node.op_type for node in nodes),
)
def test_elements_decide_or_may(build_model: BuildModel, nodes: list[Any]) -> None:
    assert not holds(build_model, *nodes)


def rows() -> Iterator[tuple[str, int]]:
    """Every operator of the table with the inputs that it names and some version of it has."""
    for operator, inputs in DECIDE.items():
        yield from ((operator, index) for index in inputs if index < inputs_of(operator))


def inputs_of(operator: str) -> int:
    """The most that any version has."""
    schemas = onnx.defs.get_all_schemas_with_history()
    return max(len(each.inputs) for each in schemas if (each.domain, each.name) == ("", operator))


@pytest.mark.parametrize(("operator", "index"), list(rows()))
def test_each_row_of_the_table_refuses(build_model: BuildModel, operator: str, index: int) -> None:
    def with_input(name: str) -> bool:
        inputs = ["half"] * inputs_of(operator)
        inputs[index] = name
        return holds(build_model, Node(operator, inputs, ["y"]))

    assert not with_input("k")
    assert with_input("two")


def test_every_operator_that_was_refused_exists() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert names >= REFUSED


def test_an_input_with_a_default_is_an_input(build_model: BuildModel) -> None:
    model = build_model(
        [Node("Expand", ["x", "k"], ["y"])],
        INPUTS,
        {"y": (FLOAT, None)},
        {"k": np.array([4], np.int64)},
    )
    assert not sized_by_shapes(model)


def body(*nodes: Any) -> Any:
    out = helper.make_tensor_value_info("out", FLOAT, None)
    return helper.make_graph(nodes, "body", [], [out])


@pytest.mark.parametrize(
    ("node", "expected"),
    [(Node("Relu", ["x"], ["out"]), True), (Node("Expand", ["half", "k"], ["out"]), False)],
    ids=["both keep the rule", "one does not"],
)
@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_both_bodies_of_an_if_count(
    build_model: BuildModel, node: Any, expected: bool, branch: str
) -> None:
    bodies = {"then_branch": body(Node("Abs", ["x"], ["out"]))}
    bodies["else_branch"] = body(Node("Neg", ["x"], ["out"]))
    bodies[branch] = body(node)
    assert holds(build_model, Node("If", ["c"], ["y"], **bodies)) is expected


def test_what_an_if_chose_comes_from_its_condition(build_model: BuildModel) -> None:
    """Two constants: the caller says which."""
    small, large = (
        Node("Constant", [], ["out"], value=helper.make_tensor("v", INT64, [1], [n]))
        for n in (1, 10**9)
    )
    choice = Node("If", ["c"], ["k2"], then_branch=body(small), else_branch=body(large))
    assert not holds(build_model, choice, Node("Expand", ["half", "k2"], ["y"]))


def test_bodies_that_are_repeated_are_out(build_model: BuildModel) -> None:
    loop = Node("Loop", ["two", ""], ["y"], body=body(Node("Abs", ["x"], ["out"])))
    assert not holds(build_model, loop)


def test_operators_that_the_file_defines_are_out(build_model: BuildModel) -> None:
    own = helper.make_function(
        "", "Relu", ["a"], ["b"], [Node("Abs", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    model = build_model([Node("Relu", ["x"], ["y"])], INPUTS, {"y": (FLOAT, None)}, functions=[own])
    assert not sized_by_shapes(model)


@pytest.mark.parametrize("domain", VERSIONS_MAX)
def test_operator_sets_of_the_future_are_out(build_model: BuildModel, domain: str) -> None:
    model = build_model([Node("Relu", ["x"], ["y"])], INPUTS, {"y": (FLOAT, None)})
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid(domain, VERSIONS_MAX[domain]))
    assert sized_by_shapes(model)
    model.opset_import[0].version += 1
    assert not sized_by_shapes(model)
