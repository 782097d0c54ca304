# SPDX-License-Identifier: Apache-2.0
"""How far a converted graph is from its FP32 original, measured on a CPU that lacks its type.

ONNX Runtime's CPU kernels are not asked to compute in 16 bits: it has none for BF16, and for FP16
it joins casts so that whole chains stay FP32 and hide what overflows. The converted graph is
instead run in FP32 with each value that is 16 bits wide in it rounded to its type when it is made.
That is what a GPU computes which multiplies in 16 bits and adds in 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines.output_figures import OutputFigures, compare, worse
from thirdrail_engines.plans import Profile
from thirdrail_engines.precision import graphs
from thirdrail_engines.precision.trials import SEEDS, open_subject, try_inputs


@dataclass(frozen=True, slots=True)
class Figures:
    """outputs: the worst over all runs. fault: why there are none."""

    outputs: tuple[OutputFigures, ...] = ()
    runs: tuple[str, ...] = ()
    fault: str = ""


def measure(
    reference: Path, converted: Any, low: int, folder: Path, profiles: Sequence[Profile] = ()
) -> Figures:
    """Run both graphs on the same seeded inputs. Raises ModelFileError when one cannot run.

    converted: with the types of its values. low: the 16-bit type, as ONNX numbers it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(converted)
    _round_values(model.graph, graphs.typed_values(model.graph, low), low)
    rounding = folder / "rounding.onnx"
    onnx.save(model, rounding)
    wide, narrow = open_subject(reference, profiles), open_subject(rounding)
    names = wide.outputs
    worst = {name: OutputFigures(name) for name in names}
    runs: list[str] = []
    for seed in SEEDS:
        trial = try_inputs(wide, seed, names)
        if isinstance(trial, str):
            return Figures(fault=trial)
        results = narrow.session.run(names, trial.inputs)
        for name, got, expected in zip(names, results, trial.results, strict=True):
            worst[name] = worse(worst[name], compare(name, got, expected))
        runs.append(f"{trial.name} seed={seed}")
    rounding.unlink()
    return Figures(tuple(worst.values()), tuple(runs))


def _round_values(graph: Any, low_values: frozenset[str], low: int) -> None:
    """Make every value FP32, and round those that were of the type `low`."""
    for each in graphs.all_graphs(graph):
        del each.value_info[:]
        for value in (*each.input, *each.output):
            if value.type.tensor_type.elem_type == low:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for tensor in each.initializer:
            _widen(tensor, low)
        nodes = []
        for node in each.node:
            nodes.extend(_rounded(node, low_values, low))
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del each.node[:]
        each.node.extend(copies)


def _rounded(node: Any, low_values: frozenset[str], low: int) -> list[Any]:
    casts = []
    for index, name in enumerate(node.output):
        if name in low_values:
            exact, rounded = f"{name}__exact", f"{name}__rounded"
            node.output[index] = exact
            casts.append(helper.make_node("Cast", [exact], [rounded], to=low))
            casts.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == low:
            attribute.i = TensorProto.FLOAT
        elif attribute.HasField("t"):
            _widen(attribute.t, low)
    return [node, *casts]


def _widen(tensor: Any, low: int) -> None:
    if tensor.data_type == low:
        array = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
