# SPDX-License-Identifier: Apache-2.0
"""Engines: a model file becomes something that runs."""

import os

# Official builds of ONNX Runtime report to their maker what they load and run, unless this is set
# before their first import. A server that was asked for nothing but gRPC must not talk to others.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from thirdrail_engines.engine import (
    Engine,
    EngineError,
    EngineInputError,
    EngineMemoryError,
    EngineSpec,
    ModelFileError,
)
from thirdrail_engines.engine_report import Attempt, EngineReport, LoadedEngine
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.load import load
from thirdrail_engines.malloc import use_one_arena
from thirdrail_engines.options import EngineOptions, threads_per_run
from thirdrail_engines.proof import BatchProof, prove_batching, seeded_inputs

__all__ = [
    "Attempt",
    "BatchProof",
    "Engine",
    "EngineError",
    "EngineInputError",
    "EngineMemoryError",
    "EngineOptions",
    "EngineReport",
    "EngineSpec",
    "Inspector",
    "LoadedEngine",
    "ModelFileError",
    "load",
    "prove_batching",
    "seeded_inputs",
    "threads_per_run",
    "use_one_arena",
]
