# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's builder: the graph after all its optimisations for this CPU, as a plan.

Such a plan belongs to the CPU's instruction sets (cpu_target.py): they decide how weights are laid
out and which operators are fused.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from thirdrail_engines.builds.result import Built, PlanTensor
from thirdrail_engines.engine import EngineSpec
from thirdrail_engines.inspect_graphs import look_at
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_plan import write_plan
from thirdrail_engines.onnxruntime_session import optimise, spec_of
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import BuildError, BuildFault, PlanRequest, TellProgress
from thirdrail_engines.positions import STANDARD_DOMAINS

_STEPS = 3


def build(request: PlanRequest, model: Path, folder: Path, tell: TellProgress) -> Built:
    """model: what to build, the request's source or what earlier steps made of it.

    Raises ModelFileError when ONNX Runtime refuses it, BuildError when it is too old for plans, or
    of another version than the plan is for.
    """
    if request.builder_version not in ("", ort.__version__):
        raise BuildError(
            BuildFault.MISSING,
            f"onnxruntime {ort.__version__} is installed now, and who asked for this build runs "
            f"{request.builder_version}: restart the server",
        )
    if not hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory"):
        raise BuildError(
            BuildFault.MISSING,
            f"onnxruntime {ort.__version__} cannot load plans: pip install --upgrade onnxruntime",
        )
    graph, weights, plan = folder / "graph.onnx", folder / "weights", folder / "model.plan"
    tell("reading", 0, _STEPS)
    findings, source_layers, warnings = _look_at(model)
    tell("optimising", 1, _STEPS)
    options = EngineOptions(threads_max=max(1, request.threads_max))
    session = optimise(model, options, graph, weights)
    optimised = _read(graph)
    if _has_weights_in_bodies(optimised.graph):
        weights.unlink()
        session = optimise(model, options, graph, None)
    tell("writing", 2, _STEPS)
    write_plan(plan, graph, weights, findings)
    tensors = tuple(_tensors(spec_of(model, session, findings)))
    return Built(plan, _layers(optimised), source_layers, tensors, warnings)


def _look_at(path: Path) -> tuple[Findings, dict[str, int], tuple[str, ...]]:
    try:
        model = _read(path)
        found = look_at(model)
    except Exception as error:  # whatever the parser meets in a stranger's file
        text = f"{type(error).__name__}: {error}"
        return Findings(error=text), {}, (f"every input will be copied: {text}",)
    findings = Findings(
        frozenset(found["positional_inputs"]),
        frozenset(found["unranked"]),
        found["sized_by_shapes"],
    )
    return findings, _layers(model), ()


def _read(path: Path) -> Any:
    return onnx.load(path, load_external_data=False)


def _has_weights_in_bodies(graph: Any) -> bool:
    """Whether a body keeps constants in the file of weights, where ONNX Runtime would look for them
    at load: only those of the graph itself can be handed to it in memory."""
    bodies = itertools.islice(_graphs(graph), 1, None)
    return any(
        tensor.data_location == onnx.TensorProto.EXTERNAL
        for body in bodies
        for tensor in body.initializer
    )


def _layers(model: Any) -> dict[str, int]:
    """How many nodes of each operator, bodies included, the most frequent first."""
    nodes = (node for graph in _graphs(model.graph) for node in graph.node)
    return dict(Counter(_operator(node) for node in nodes).most_common())


def _operator(node: Any) -> str:
    name: str = node.op_type
    return name if node.domain in STANDARD_DOMAINS else f"{node.domain}.{name}"


def _graphs(graph: Any) -> Iterator[Any]:
    """The graph, and the bodies of its nodes."""
    pending = [graph]
    while pending:  # ends: bodies are a tree in the file
        current = pending.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs


def _tensors(spec: EngineSpec) -> Iterator[PlanTensor]:
    for tensor in spec.inputs:
        yield PlanTensor(tensor.name, tensor.dtype.name, tensor.shape, is_input=True)
    for tensor in spec.outputs:
        yield PlanTensor(tensor.name, tensor.dtype.name, tensor.shape, is_input=False)
