# SPDX-License-Identifier: Apache-2.0
"""The reference of a proof, in the process that computes it: ONNX Runtime or PyTorch, on the CPU.

PyTorch reads a `.pt2` file here, which runs what is in it: as in a build, and in no other process
than one that has no network and no secrets.
"""

from contextlib import closing
from pathlib import Path

from thirdrail_engines.engine import Engine
from thirdrail_engines.expectation_file import write_expectations
from thirdrail_engines.expectations import ReferenceRequest, expectations
from thirdrail_engines.inspector import Findings
from thirdrail_engines.onnxruntime_engine import OnnxRuntimeEngine, load_plan
from thirdrail_engines.onnxruntime_session import open_session, spec_of
from thirdrail_engines.options import EngineOptions

_NAME = "expectations"


def compute(request: ReferenceRequest, folder: Path) -> Path:
    """The file, in `folder`. Raises ModelFileError when the model cannot be run, and OSError."""
    limits = request.limits
    with closing(_opened(request)) as reference:
        runs = expectations(reference, request.profiles, request.values, limits, request.times)
        path = folder / _NAME
        write_expectations(path, reference.spec, runs, limits.kept_bytes_max)
    return path


def _opened(request: ReferenceRequest) -> Engine:
    options = EngineOptions(threads_max=request.threads_max)
    if request.plan is not None:
        return load_plan(request.plan.read_bytes(), request.source, options=options)
    if request.source.suffix == ".pt2":
        from thirdrail_engines.torch_engine import load_torch

        return load_torch(request.source, options=options, is_within_bounds=True)
    session = open_session(request.source, options)
    # Nobody else writes to its inputs: what the graph tells about them is of no use here.
    return OnnxRuntimeEngine(session, spec_of(request.source, session, Findings()))
