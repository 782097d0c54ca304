# SPDX-License-Identifier: Apache-2.0
"""What can be read of a network that the parser made, and of the ONNX file that it came from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from thirdrail_engines.builds.result import PlanTensor
from thirdrail_engines.tensorrt import native as t

# TensorRT's and ONNX's element types by their names in ours. Others have none, and keep theirs.
_DTYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "DOUBLE": "FP64",
    "STRING": "BYTES",
}


def tensors_of(network: t.INetworkDefinition) -> tuple[PlanTensor, ...]:
    inputs = [_tensor(network.get_input(index), True) for index in range(network.num_inputs)]
    outputs = [_tensor(network.get_output(index), False) for index in range(network.num_outputs)]
    return (*inputs, *outputs)


def _tensor(tensor: t.ITensor, is_input: bool) -> PlanTensor:
    dtype: str = tensor.dtype.name
    shape: Sequence[int] = tensor.shape
    return PlanTensor(tensor.name, _DTYPES.get(dtype, dtype), tuple(map(int, shape)), is_input)


def layers_of(network: t.INetworkDefinition) -> dict[str, int]:
    """How many layers there are of each kind, the most frequent first."""
    kinds: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer: t.ILayer = network.get_layer(index)
        kinds[layer.type.name.lower()] += 1
    return dict(kinds.most_common())


def shape_inputs(network: t.INetworkDefinition) -> list[str]:
    """Inputs whose values set the shapes of other tensors."""
    found = []
    for index in range(network.num_inputs):
        tensor: t.ITensor = network.get_input(index)
        if tensor.is_shape_tensor:
            name: str = tensor.name
            found.append(name)
    return found


def same_names(network: t.INetworkDefinition) -> list[tuple[str, list[int], str]]:
    """Dimensions of one input that have one name: which input, which of them, what name."""
    found = []
    for index in range(network.num_inputs):
        tensor: t.ITensor = network.get_input(index)
        dims: dict[str, list[int]] = {}
        for dim in range(len(tensor.shape)):
            dim_name: str | None = tensor.get_dimension_name(dim)
            if dim_name:
                dims.setdefault(dim_name, []).append(dim)
        name: str = tensor.name
        found += [(name, same, dim_name) for dim_name, same in dims.items() if len(same) > 1]
    return found


def declared_dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """The inputs and outputs of an ONNX file -> their element types."""
    types = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*model.graph.input, *model.graph.output)
    }
    return {name: _DTYPES.get(dtype, dtype) for name, dtype in types.items()}


def changed_dtype(declared: Mapping[str, str], tensors: Sequence[PlanTensor]) -> str:
    """What the parser made of another type, in words, or nothing.

    It makes FP32 of FP64 without a word, which is another model for its callers.
    """
    for tensor in tensors:
        dtype = declared.get(tensor.name, tensor.dtype)
        if dtype != tensor.dtype:
            kind = "input" if tensor.is_input else "output"
            return f"{kind} '{tensor.name}' is {dtype}, of which TensorRT would make {tensor.dtype}"
    return ""


def conditionals(model: onnx.ModelProto) -> list[str]:
    """The names of the If nodes of an ONNX file."""
    return [node.name for node in model.graph.node if node.op_type == "If"]


def read_onnx(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)
