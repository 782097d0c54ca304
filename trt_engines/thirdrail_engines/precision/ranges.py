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

    The measures are nodes of the graph themselves: only their results, one number for each value,
    outlive the node that made it.
    """
    model = graphs.with_types(onnx.load(path))
    names = sorted(
        graphs.typed_values(model.graph, TensorProto.FLOAT)
        & {name for node in model.graph.node for name in node.output}
    )
    for index, name in enumerate(names):
        size, largest = f"{name}__size_{index}", f"{name}__largest_{index}"
        model.graph.node.append(helper.make_node("Abs", [name], [size]))
        model.graph.node.append(helper.make_node("ReduceMax", [size], [largest], keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    measured = path.with_name("measured.onnx")
    onnx.save(model, measured)
    subject = open_subject(measured, profiles)
    largest_seen = dict.fromkeys(names, 0.0)
    wanted = [output.name for output in model.graph.output[-len(names) :]] if names else []
    fault = ""
    for seed in SEEDS:
        trial = try_inputs(subject, seed, wanted)
        if isinstance(trial, str):
            fault = trial
            break
        for name, found in zip(names, trial.results, strict=True):
            if np.isfinite(found):  # an infinity of the model's own stays one in every format
                largest_seen[name] = max(largest_seen[name], float(found))
    measured.unlink()
    return Ranges({} if fault else largest_seen, fault)
