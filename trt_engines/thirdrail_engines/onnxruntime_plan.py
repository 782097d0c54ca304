# SPDX-License-Identifier: Apache-2.0
"""A plan of ONNX Runtime's builder: one run of bytes that holds all that loading it takes.

The graph, as ONNX Runtime wrote it after its optimisations for this CPU. Its weights, apart, since
protobuf ends at 2 GiB and would have them parsed and copied once more. And what was found in the
graph that was optimised (inspector.py), so that nothing else is read at load.

The parts of the file (plan_files.py): the graph, the weights.

The findings. That inputs are read by position (positions.py) was judged of the graph before its
optimisation, for a plan as for an engine that loads its source: that engine's session applies the
very same optimisations to it, so both run the same kernels on the same inputs. The optimised graph
itself cannot be judged: its operators are ONNX Runtime's own, of which no standard speaks.
"""

from dataclasses import dataclass
from pathlib import Path

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.inspector import Findings
from thirdrail_engines.plan_files import checking_header, read_plan_file, write_plan_file

_KIND = b"thirdrail onnxruntime plan 1\n"


@dataclass(frozen=True, slots=True)
class OnnxRuntimePlan:
    graph: bytes
    weights: memoryview  # empty where the graph has none of size
    weights_name: str  # by which the graph refers to them
    findings: Findings


def write_plan(path: Path, graph: Path, weights: Path, findings: Findings) -> None:
    """From the two files that ONNX Runtime wrote. `weights` is not there where it has none."""
    weights_bytes = weights.stat().st_size if weights.exists() else 0
    header = {
        "graph_bytes": graph.stat().st_size,
        "weights_bytes": weights_bytes,
        "weights_name": weights.name,
        "positional_inputs": sorted(findings.positional_inputs),
        "unranked": sorted(findings.unranked),
        "sized_by_shapes": findings.sized_by_shapes,
        "error": findings.error,
    }
    write_plan_file(path, _KIND, header, (graph, weights) if weights_bytes else (graph,))


def read_plan(name: str, data: bytes | memoryview) -> OnnxRuntimePlan:
    """The weights are a view of `data`. Raises ModelFileError when that is no whole plan."""
    header, parts = read_plan_file(name, data, _KIND, "ONNX Runtime's builder")
    with checking_header(name):
        weights_at = int(header["graph_bytes"])
        end = weights_at + int(header["weights_bytes"])
        findings = Findings(
            frozenset(header["positional_inputs"]),
            frozenset(header["unranked"]),
            bool(header["sized_by_shapes"]),
            header["error"],
        )
        weights_name = str(header["weights_name"])
    if not 0 <= weights_at <= end == parts.nbytes:
        raise ModelFileError(f"{name}: its plan has parts of {parts.nbytes} bytes, expected {end}")
    return OnnxRuntimePlan(bytes(parts[:weights_at]), parts[weights_at:end], weights_name, findings)
