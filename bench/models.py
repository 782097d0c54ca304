# SPDX-License-Identifier: Apache-2.0
"""The ONNX models that are measured, written into repository folders, and requests for them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from thirdrail.tensors import Array
from thirdrail.v1 import inference_pb2, tensor_pb2
from thirdrail_server.inference import grpc_service_pb2

MLP_LAYERS = 4
MLP_WIDTH = 1024
MLP_ROWS_MAX = 16
MLP_DELAY_US = 500

MLP_CONFIG = f"""
max_batch_size: {MLP_ROWS_MAX}
dynamic_batching {{ max_queue_delay_microseconds: {MLP_DELAY_US} }}
"""


def write_identity(repository: Path, name: str = "identity", config: str = "") -> None:
    """y = x for FP32 [n]."""
    node = helper.make_node("Identity", ["x"], ["y"])
    tensors = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n"]) for each in "xy"]
    graph = helper.make_graph([node], "identity", tensors[:1], tensors[1:])
    _write(repository, name, graph, config)


def write_scale(repository: Path, name: str, size_bytes_max: int) -> None:
    """y = 2x for FP32 [n] of up to so many bytes, and done = y's first element."""
    count = size_bytes_max // 4
    shapes: dict[str, list[str | int]] = {"x": ["n"], "y": ["n"], "done": [1]}
    x, y, done = (
        helper.make_tensor_value_info(each, TensorProto.FLOAT, shape)
        for each, shape in shapes.items()
    )
    names = ("zero", "one")
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("Slice", ["y", *names], ["done"]),
    ]
    ends = [numpy_helper.from_array(np.array([end]), name) for end, name in enumerate(names)]
    graph = helper.make_graph(nodes, "scale", [x], [y, done], ends)
    profile = f'parameters {{ key: "profile.0.x" value {{ string_value: "1,{count},{count}" }} }}\n'
    _write(repository, name, graph, profile)


def write_mlp(repository: Path, name: str = "mlp", more_config: str = "") -> Path:
    """Four layers of 1024x1024 with ReLU, FP32 [rows, 1024]. Returns the model file."""
    random = np.random.default_rng(1)
    nodes, weights = [], []
    for layer in range(MLP_LAYERS):
        values = random.standard_normal((MLP_WIDTH, MLP_WIDTH), np.float32) / MLP_WIDTH**0.5
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        source = "x" if layer == 0 else f"r{layer - 1}"
        target = "y" if layer == MLP_LAYERS - 1 else f"r{layer}"
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [target]))
    shape: list[str | int | None] = ["rows", MLP_WIDTH]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "mlp", tensors[:1], tensors[1:], weights)
    return _write(repository, name, graph, MLP_CONFIG + more_config)


def _write(repository: Path, name: str, graph: onnx.GraphProto, config: str = "") -> Path:
    opset = [helper.make_opsetid("", 17)]
    built = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(built)
    file = repository / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(built, file)
    if config:
        (repository / name / "config.pbtxt").write_text(config)
    return file


def request(model: str, name: str, array: Array) -> bytes:
    """A serialized thirdrail.v1.InferRequest with one input."""
    from thirdrail.dtypes import dtype_of_array

    tensor = tensor_pb2.Tensor(
        name=name,
        data_type=dtype_of_array(array).value,
        shape=array.shape,
        raw=array.tobytes(),
    )
    return inference_pb2.InferRequest(model_name=model, inputs=[tensor]).SerializeToString()


def kserve_request(model: str, name: str, array: Array) -> bytes:
    """The same as a serialized inference.ModelInferRequest."""
    from thirdrail.dtypes import dtype_of_array

    tensor = grpc_service_pb2.ModelInferRequest.InferInputTensor(
        name=name, datatype=dtype_of_array(array).name, shape=array.shape
    )
    return grpc_service_pb2.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[array.tobytes()]
    ).SerializeToString()


def floats(size_bytes: int) -> Array:
    """So many bytes of FP32, as one dimension."""
    return np.arange(size_bytes // 4, dtype=np.float32)
