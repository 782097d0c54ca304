# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""Small ONNX graphs as PyTorch programs, so that one contract suite is for both. Imports torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from support.torch_modules import save_exported
from thirdrail_engines.torch_sources.exported import DTYPES

_BY_NUMPY = {row.numpy: dtype for dtype, row in DTYPES.items()}

_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda x: x,
    "Neg": lambda x: -x,
    "Add": lambda x, y: x + y,
    "Mul": lambda x, y: x * y,
    "MatMul": lambda x, y: x @ y,
    "Reshape": lambda x, shape: x.reshape(shape.tolist()),
    "Unsqueeze": lambda x, axis: x.unsqueeze(int(axis[0])),
    "Cast": lambda x: x,  # to its own type
    "Slice": lambda x, _start, _end: x[0:],
    "Compress": lambda x, keep: x[keep],
    "Gather": lambda x, index: x.index_select(0, index),
}


class Graph(torch.nn.Module):
    def __init__(self, graph: Any) -> None:
        super().__init__()
        self._graph = graph
        self._numbers = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self._floats = [n for n, a in self._numbers.items() if a.dtype.kind == "f"]
        for name in self._floats:
            self.register_buffer(name, torch.from_numpy(self._numbers[name].copy()))

    def evaluate(self, inputs: Mapping[str, Any]) -> Any:
        values: dict[str, Any] = {**self._numbers, **inputs}
        values |= {name: getattr(self, name) for name in self._floats}
        for node in self._graph.node:
            arguments = [values[name] for name in node.input]
            values[node.output[0]] = _OPERATORS[node.op_type](*arguments)
        return {output.name: values[output.name] for output in self._graph.output}


def _with_names(names: list[str]) -> type[Graph]:
    """Whose arguments have these names: torch.export reads them off the signature."""
    listed, passed = ", ".join(names), ", ".join(f"{name}={name}" for name in names)
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {listed}): return self.evaluate(dict({passed}))", scope)
    return type("NamedGraph", (Graph,), {"forward": scope["forward"]})


def save_graph(onnx_path: Path) -> Path:
    """The same as a .pt2 file beside it. Named dimensions are open, also for sizes of 0 and 1."""
    graph = onnx.load(onnx_path).graph
    examples: dict[str, Any] = {}
    axes: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            sizes.setdefault(dim.dim_param, 4 + len(sizes))
        numpy = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims]
        examples[value.name] = torch.ones(shape, dtype=_BY_NUMPY[np.dtype(numpy)])
        axes[value.name] = {i: dim.dim_param for i, dim in enumerate(dims) if dim.dim_param}
    module = _with_names(list(examples))(graph)
    path = onnx_path.with_suffix(".pt2")
    return save_exported(path, module, tuple(examples.values()), tuple(axes.values()), size_min=0)
