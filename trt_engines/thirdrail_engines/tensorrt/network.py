# SPDX-License-Identifier: Apache-2.0
"""What can be read of a network that the parser made."""

from collections import Counter
from collections.abc import Sequence

from thirdrail_engines.builds.result import PlanTensor
from thirdrail_engines.tensorrt import native as t

_DTYPES = {"FLOAT": "FP32", "HALF": "FP16"}  # the others are called as ours are


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
        kind: str = layer.type.name
        kinds[kind.lower()] += 1
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
