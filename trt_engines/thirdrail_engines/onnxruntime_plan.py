# SPDX-License-Identifier: Apache-2.0
"""A plan of ONNX Runtime's builder: one run of bytes that holds all that loading it takes.

The graph, as ONNX Runtime wrote it after its optimisations for this CPU. Its weights, apart, since
protobuf ends at 2 GiB and would have them parsed and copied once more. And what was found in the
graph that was optimised (inspector.py), so that nothing else is read at load.

Bytes: _MAGIC, the length of the header in 8 bytes (little endian), the header in JSON, the graph,
the weights.

The findings. That inputs are read by position (positions.py) was judged of the graph before its
optimisation, for a plan as for an engine that loads its source: that engine's session applies the
very same optimisations to it, so both run the same kernels on the same inputs. The optimised graph
itself cannot be judged: its operators are ONNX Runtime's own, of which no standard speaks.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.inspector import Findings

_MAGIC = b"thirdrail onnxruntime plan 1\n"
_LENGTH_BYTES = 8
_HEADER_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class OnnxRuntimePlan:
    graph: bytes
    weights: memoryview  # empty where the graph has none of size
    weights_name: str  # by which the graph refers to them
    findings: Findings


def write_plan(path: Path, graph: Path, weights: Path, findings: Findings) -> None:
    """From the two files that ONNX Runtime wrote. `weights` is not there where it has none."""
    weights_bytes = weights.stat().st_size if weights.exists() else 0
    header = json.dumps(
        {
            "graph_bytes": graph.stat().st_size,
            "weights_bytes": weights_bytes,
            "weights_name": weights.name,
            "positional_inputs": sorted(findings.positional_inputs),
            "unranked": sorted(findings.unranked),
            "error": findings.error,
        }
    ).encode()
    with path.open("xb") as file:
        file.write(_MAGIC + len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for part in (graph, weights)[: 2 if weights_bytes else 1]:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file, 1 << 20)


def read_plan(name: str, data: bytes | memoryview) -> OnnxRuntimePlan:
    """The weights are a view of `data`. Raises ModelFileError when that is no whole plan."""
    view = memoryview(data)
    start = len(_MAGIC) + _LENGTH_BYTES
    if bytes(view[: len(_MAGIC)]) != _MAGIC or view.nbytes < start:
        raise ModelFileError(f"{name}: its plan is none that ONNX Runtime's builder wrote")
    header_bytes = int.from_bytes(view[len(_MAGIC) : start], "little")
    try:
        if header_bytes > _HEADER_BYTES_MAX:
            raise ValueError
        header: dict[str, Any] = json.loads(bytes(view[start : start + header_bytes]))
        graph_at = start + header_bytes
        weights_at = graph_at + int(header["graph_bytes"])
        end = weights_at + int(header["weights_bytes"])
        findings = Findings(
            frozenset(header["positional_inputs"]), frozenset(header["unranked"]), header["error"]
        )
        weights_name = str(header["weights_name"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelFileError(f"{name}: its plan has a damaged header") from None
    if not graph_at <= weights_at <= end == view.nbytes:
        raise ModelFileError(f"{name}: its plan has {view.nbytes} bytes, expected {end}")
    return OnnxRuntimePlan(
        bytes(view[graph_at:weights_at]), view[weights_at:end], weights_name, findings
    )
