# SPDX-License-Identifier: Apache-2.0
"""How large the numbers inside a graph get, measured on seeded inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines.plans import Profile
from thirdrail_engines.precision import graphs
from thirdrail_engines.precision.trials import SEEDS, open_subject, try_inputs

_ENDS = ("Max", "Min")
_END = "{}__{}"


@dataclass(frozen=True, slots=True)
class Ranges:
    """magnitudes: per FP32 value, the largest that was seen. fault: why there are none."""

    magnitudes: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""

    def nodes_beyond(self, graph: Any, magnitude_max: float) -> frozenset[str]:
        """Names of the nodes that read or write a larger number, weights included.

        Infinite constants are meant to be infinite, and are that in every format.
        """
        large = {name for name, found in self.magnitudes.items() if found > magnitude_max}
        for name, tensor in graphs.float_weights(graph).items():
            array = np.abs(numpy_helper.to_array(tensor))
            if array[np.isfinite(array)].max(initial=0.0) > magnitude_max:
                large.add(name)
        return frozenset(
            node.name
            for node in graphs.all_nodes(graph)
            if any(name in large for name in (*node.input, *node.output))
        )


def find_ranges(path: Path, profiles: Sequence[Profile] = ()) -> Ranges:
    """Run the graph on the seeded inputs, with a measure at each of its values.

    The measures are nodes of the graph themselves, right behind those that make the values: only
    their results, two numbers for each value, outlive them.
    """
    model = graphs.with_types(onnx.load(path))
    names = _add_measures(model.graph)
    measured = path.with_name("measured.onnx")
    onnx.save(model, measured)
    subject = open_subject(measured, profiles)
    magnitudes = dict.fromkeys(names, 0.0)
    wanted = [_END.format(name, end) for name in names for end in _ENDS]
    fault = ""
    for seed in SEEDS:
        trial = try_inputs(subject, seed, wanted)
        if isinstance(trial, str):
            fault = trial
            break
        found = dict(zip(wanted, trial.results, strict=True))
        for name in names:
            ends = np.abs([found[_END.format(name, end)] for end in _ENDS])
            # An infinity of the model's own stays one in every format.
            magnitudes[name] = max(magnitudes[name], float(ends[np.isfinite(ends)].max(initial=0)))
    measured.unlink()
    return Ranges({} if fault else magnitudes, fault)


def _add_measures(graph: Any) -> list[str]:
    """Returns the names of the values that are measured."""
    floats = graphs.typed_values(graph, TensorProto.FLOAT)
    names: list[str] = []
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        for name in floats.intersection(node.output):
            names.append(name)
            for end in _ENDS:
                scalar = _END.format(name, end)
                nodes.append(helper.make_node(f"Reduce{end}", [name], [scalar], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(scalar, TensorProto.FLOAT, []))
    del graph.node[:]
    graph.node.extend(nodes)
    return names
