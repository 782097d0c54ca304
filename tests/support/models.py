# SPDX-License-Identifier: Apache-2.0
"""Small ONNX models, written into a repository folder for the server to load.

Each builder names its tensors as the tests use them; see `write_standard_repository` for the list.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

from thirdrail.tensors import Array

ONNX_TYPES = {
    "BOOL": T.BOOL,
    "UINT8": T.UINT8,
    "UINT16": T.UINT16,
    "UINT32": T.UINT32,
    "UINT64": T.UINT64,
    "INT8": T.INT8,
    "INT16": T.INT16,
    "INT32": T.INT32,
    "INT64": T.INT64,
    "FP16": T.FLOAT16,
    "BF16": T.BFLOAT16,
    "FP32": T.FLOAT,
    "FP64": T.DOUBLE,
    "BYTES": T.STRING,
}

Shape = Sequence[int | str]


def tensor(name: str, dtype: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape))


def constant(name: str, array: Array) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(array, name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(built)
    return built


def write(
    repository: Path, name: str, built: onnx.ModelProto, config: str = "", version: int = 1
) -> Path:
    """Put a model into a repository; written under another name first, so that a server that looks
    on never sees half of it. Returns the model's folder."""
    folder = repository / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.pbtxt").write_text(config)
    unfinished = folder / str(version) / ".model.onnx"
    onnx.save(built, unfinished)
    unfinished.rename(folder / str(version) / "model.onnx")
    return folder


def identity(dtype: str = "FP32", shape: Shape = ("n",)) -> onnx.ModelProto:
    """y = x."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return model([node], [tensor("x", dtype, shape)], [tensor("y", dtype, shape)])


def double() -> onnx.ModelProto:
    """y = 2 x for [n] FP32: the model of the README's quick start."""
    node = helper.make_node("Mul", ["x", "two"], ["y"])
    two = constant("two", np.array([2], np.float32))
    return model([node], [tensor("x", "FP32", ("n",))], [tensor("y", "FP32", ("n",))], [two])


def add(value: float | None = None, width: int = 4) -> onnx.ModelProto:
    """c = a + b for [n, width] FP32; with a value, c = a + value."""
    shape = ("n", width)
    inputs = [tensor("a", "FP32", shape)]
    constants = []
    if value is None:
        inputs.append(tensor("b", "FP32", shape))
    else:
        constants.append(constant("b", np.array([value], np.float32)))
    node = helper.make_node("Add", ["a", "b"], ["c"])
    return model([node], inputs, [tensor("c", "FP32", shape)], constants)


def gather() -> onnx.ModelProto:
    """y = table[index]: fails at run time for an index of 4 or more."""
    table = constant("table", np.array([10, 11, 12, 13], np.float32))
    node = helper.make_node("Gather", ["table", "index"], ["y"])
    return model([node], [tensor("index", "INT64", ("n",))], [tensor("y", "FP32", ("n",))], [table])


def positives() -> onnx.ModelProto:
    """y = the rows of x that are above 0: as a model that batches, at fault where some are not."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["is_above"]),
        helper.make_node("Reshape", ["is_above", "flat"], ["keep"]),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    constants = [constant("zero", np.array(0, np.float32)), constant("flat", np.array([-1]))]
    return model(nodes, [tensor("x", "FP32", ("n", 1))], [tensor("y", "FP32", ("k", 1))], constants)


def slow(width: int = 64) -> onnx.ModelProto:
    """y = x after `turns` turns of a loop that multiplies two 64x64 matrices: 5 to 30 us each.

    width: of the second matrix, the model's weights, where they are to be larger.
    Inputs: x FP32 [n], turns INT64 []. It lets a test hold an instance for as long as it wants.
    """
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m", "weights"], ["m_next"]),
            helper.make_node("Identity", ["condition"], ["condition_next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", T.INT64, []),
            helper.make_tensor_value_info("condition", T.BOOL, []),
            helper.make_tensor_value_info("m", T.FLOAT, [64, width]),
        ],
        [
            helper.make_tensor_value_info("condition_next", T.BOOL, []),
            helper.make_tensor_value_info("m_next", T.FLOAT, [64, width]),
        ],
    )
    nodes = [
        helper.make_node("Loop", ["turns", "", "start"], ["m_last"], body=body),
        helper.make_node("ReduceSum", ["m_last"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    constants = [
        constant("weights", np.eye(width, dtype=np.float32)),
        constant("start", np.ones((64, width), np.float32)),
        constant("zero", np.array(0, np.float32)),
    ]
    inputs = [tensor("x", "FP32", ("n",)), tensor("turns", "INT64", ())]
    return model(nodes, inputs, [tensor("y", "FP32", ("n",))], constants)


CLASSIFIER_CONFIG = """
max_batch_size: 4
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" } ]
"""


def classifier() -> onnx.ModelProto:
    """scores = x for [n, 3] FP32; its configuration gives the classes names."""
    node = helper.make_node("Identity", ["x"], ["scores"])
    shape = ("n", 3)
    return model([node], [tensor("x", "FP32", shape)], [tensor("scores", "FP32", shape)])


BATCHED_CONFIG = """
max_batch_size: 8
dynamic_batching { max_queue_delay_microseconds: 2000 }
"""

# One waiting request at most, so that a third caller is refused while a slow one runs.
NARROW_CONFIG = """
dynamic_batching { default_queue_policy { max_queue_size: 1 } }
"""


def write_standard_repository(repository: Path) -> None:
    """identity_TYPE for every data type; add (batched), plus_one, gather, slow, narrow (slow with a
    queue of one), classifier (with labels)."""
    for dtype in ONNX_TYPES:
        write(repository, f"identity_{dtype.lower()}", identity(dtype))
    write(repository, "add", add(), BATCHED_CONFIG)
    write(repository, "plus_one", add(1))
    write(repository, "gather", gather())
    write(repository, "slow", slow())
    write(repository, "narrow", slow(), NARROW_CONFIG)
    folder = write(repository, "classifier", classifier(), CLASSIFIER_CONFIG)
    (folder / "labels.txt").write_text("cat\ndog\nfish\n")


def array(values: Any, dtype: str = "FP32") -> Array:
    from thirdrail.dtypes import BY_NAME

    numpy = BY_NAME[dtype].numpy
    return np.array(values, dtype=numpy)
