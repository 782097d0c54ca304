# SPDX-License-Identifier: Apache-2.0
"""What is read from and changed in ONNX graphs, with the graphs inside If, Loop and Scan."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from thirdrail.tensors import Array

_HALF, _BFLOAT, _FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT


def all_graphs(graph: Any) -> Iterator[Any]:
    """The graph, and those inside it."""
    pending = [graph]
    while pending:  # ends: bodies are a tree
        current = pending.pop()
        yield current
        pending.extend(body for node in current.node for body in _bodies(node))


def _bodies(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: Any) -> Iterator[Any]:
    for each in all_graphs(graph):
        yield from each.node


def element_types(graph: Any) -> set[int]:
    """Of all inputs, outputs and constants."""
    types: set[int] = set()
    for each in all_graphs(graph):
        types.update(v.type.tensor_type.elem_type for v in (*each.input, *each.output))
        types.update(tensor.data_type for tensor in each.initializer)
        types.update(a.t.data_type for n in each.node for a in n.attribute if a.HasField("t"))
    return types


def name_nodes(graph: Any) -> None:
    """Give every node a name of its own: nodes are blocked by name."""
    taken: set[str] = set()
    for index, node in enumerate(all_nodes(graph)):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_named"
        taken.add(node.name)


def lift_constants(graph: Any) -> None:
    """Constant nodes become initializers, whose FP32 values can be found again by their name."""
    for each in all_graphs(graph):
        outputs = {value.name for value in each.output}
        for node in [n for n in each.node if n.op_type == "Constant" and not n.domain]:
            tensor = _constant(node)
            if tensor is not None and node.output[0] not in outputs:
                tensor.name = node.output[0]
                each.initializer.append(tensor)
                each.node.remove(node)


def _constant(node: Any) -> Any | None:
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    match attribute.name:
        case "value":
            return value
        case "value_float" | "value_floats":
            return numpy_helper.from_array(np.array(value, np.float32))
        case "value_int" | "value_ints":
            return numpy_helper.from_array(np.array(value, np.int64))
    return None


def float_weights(graph: Any) -> Mapping[str, Any]:
    """The FP32 constants by name."""
    return {
        tensor.name: tensor
        for each in all_graphs(graph)
        for tensor in each.initializer
        if tensor.data_type == _FLOAT
    }


def weights_bytes(graph: Any) -> int:
    return sum(
        int(np.prod(tensor.dims, dtype=np.int64)) * _element_bytes(tensor.data_type)
        for each in all_graphs(graph)
        for tensor in each.initializer
    )


def _element_bytes(element_type: int) -> int:
    return helper.tensor_dtype_to_np_dtype(element_type).itemsize


def swap_half_for_bfloat(graph: Any, weights: Mapping[str, Any]) -> None:
    """FP16 becomes BF16 everywhere; constants are rounded anew from the FP32 `weights`."""
    for each in all_graphs(graph):
        for value in (*each.input, *each.output, *each.value_info):
            if value.type.tensor_type.elem_type == _HALF:
                value.type.tensor_type.elem_type = _BFLOAT
        for tensor in each.initializer:
            if tensor.data_type == _HALF:
                _set_array(tensor, numpy_helper.to_array(weights[tensor.name]))
        for node in each.node:
            for attribute in node.attribute:
                _swap_attribute(attribute)


def _swap_attribute(attribute: Any) -> None:
    if attribute.name in ("to", "dtype") and attribute.i == _HALF:
        attribute.i = _BFLOAT
    elif attribute.HasField("t") and attribute.t.data_type == _HALF:
        _set_array(attribute.t, numpy_helper.to_array(attribute.t))


def _set_array(tensor: Any, array: Array) -> None:
    with np.errstate(over="ignore"):
        rounded = array.astype(ml_dtypes.bfloat16)
    fresh = numpy_helper.from_array(rounded, tensor.name)
    tensor.CopyFrom(fresh)


def with_types(model: Any) -> Any:
    """The model with the types of its values as they follow from its inputs and constants.

    What it said about them before is dropped: the converter leaves wrong words there.
    """
    for each in all_graphs(model.graph):
        del each.value_info[:]
    return shape_inference.infer_shapes(model)


def typed_values(graph: Any, element_type: int) -> frozenset[str]:
    """Names of the values of one type, as far as the graph tells."""
    return frozenset(
        value.name
        for each in all_graphs(graph)
        for value in (*each.value_info, *each.output, *each.input)
        if value.type.tensor_type.elem_type == element_type
    )


def nodes_in(graph: Any, element_type: int) -> list[Any]:
    """The nodes whose results have this type, casts and the bearers of bodies left out."""
    values = typed_values(graph, element_type)
    return [
        node
        for node in all_nodes(graph)
        if node.op_type not in ("Cast", "If", "Loop", "Scan") and values.intersection(node.output)
    ]


def drop_repeated_casts(graph: Any) -> None:
    """Leave one of several equal casts. The converter adds one for each blocked reader."""
    made: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in made:
            graph.node.remove(node)
        made.update(node.output)


def join_casts(graph: Any) -> None:
    """Let nodes that stay FP32 hand their results to each other as they are.

    The converter puts casts to FP16 and back between them, where what is large becomes infinite:
    just what they were kept from.
    """
    narrowed = {n.output[0]: n.input[0] for n in graph.node if _casts_to(n, _HALF)}
    returned = {value.name for value in graph.output}
    exact: dict[str, str] = {}
    for node in list(graph.node):
        if _casts_to(node, _FLOAT) and node.input[0] in narrowed:
            if node.output[0] in returned:
                node.input[0] = narrowed[node.input[0]]
            else:
                exact[node.output[0]] = narrowed[node.input[0]]
                graph.node.remove(node)
    for node in all_nodes(graph):
        for index, name in enumerate(node.input):
            node.input[index] = exact.get(name, name)
    read = {name for node in graph.node for name in _reads(node)}
    for node in list(graph.node):
        if _casts_to(node, _HALF) and node.output[0] not in read:
            graph.node.remove(node)


def _casts_to(node: Any, element_type: int) -> bool:
    return node.op_type == "Cast" and any(
        a.name == "to" and a.i == element_type for a in node.attribute
    )


def sort_nodes(graph: Any) -> None:
    """Put producers before consumers, otherwise in the order that is there."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    waits_for: list[set[int]] = []
    for index, node in enumerate(graph.node):
        needed = {producers[name] for name in _reads(node) if name in producers}
        waits_for.append(needed - {index})
    wakes: dict[int, list[int]] = {}
    for index, needed in enumerate(waits_for):
        for each in needed:
            wakes.setdefault(each, []).append(index)
    ready = deque(index for index, needed in enumerate(waits_for) if not needed)
    order: list[int] = []
    while ready:  # ends: each node is ready once
        index = ready.popleft()
        order.append(index)
        for waiting in wakes.get(index, ()):
            waits_for[waiting].discard(index)
            if not waits_for[waiting]:
                ready.append(waiting)
    if len(order) != len(graph.node):
        raise ValueError("the graph has a ring of nodes")
    nodes = [graph.node[index] for index in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _reads(node: Any) -> Iterable[str]:
    """What a node needs, also inside its bodies."""
    yield from node.input
    for body in _bodies(node):
        for inner in all_nodes(body):
            yield from inner.input
        for each in all_graphs(body):
            yield from (value.name for value in each.output)
