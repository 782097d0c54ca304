# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights, and what can be wrong with a copy of it."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from support.models import constant, model, tensor


def two_layers(seed: int = 0, width: int = 16) -> onnx.ModelProto:
    """y [n, 8] and z [n, 8] of x [n, 16]: matrix products with a Relu between them, over
    `width` values; most: ArgMax of y."""
    random = np.random.default_rng(seed)
    first = random.standard_normal((16, width), dtype=np.float32)
    second = random.standard_normal((2, width, 8), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
        helper.make_node("MatMul", ["r", "c"], ["z"]),
        helper.make_node("ArgMax", ["y"], ["most"], axis=1),
    ]
    outputs = [
        tensor("y", "FP32", ("n", 8)),
        tensor("z", "FP32", ("n", 8)),
        tensor("most", "INT64", ("n", 1)),
    ]
    weights = [constant("a", first), constant("b", second[0]), constant("c", second[1])]
    return model(nodes, [tensor("x", "FP32", ("n", 16))], outputs, weights)


def with_weight(
    built: onnx.ModelProto, name: str, index: tuple[int, int], value: float
) -> onnx.ModelProto:
    for weight in built.graph.initializer:
        if weight.name == name:
            array = numpy_helper.to_array(weight).copy()
            array[index] = value
            weight.CopyFrom(numpy_helper.from_array(array, name))
    return built


def with_outputs_swapped(built: onnx.ModelProto) -> onnx.ModelProto:
    for node in built.graph.node:
        if "b" in node.input or "c" in node.input:
            node.input[1] = {"b": "c", "c": "b"}[node.input[1]]
    return built


def with_rounded_weights(built: onnx.ModelProto) -> onnx.ModelProto:
    for weight in built.graph.initializer:
        array = numpy_helper.to_array(weight).astype(np.float16).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return built
