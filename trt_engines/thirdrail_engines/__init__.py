# SPDX-License-Identifier: Apache-2.0
"""Engines: a model file becomes something that runs."""

from thirdrail_engines.engine import Engine, EngineError, EngineSpec, ModelFileError
from thirdrail_engines.inspector import Inspector
from thirdrail_engines.load import load
from thirdrail_engines.options import EngineOptions, threads_per_run
from thirdrail_engines.proof import BatchProof, prove_batching, seeded_inputs

__all__ = [
    "BatchProof",
    "Engine",
    "EngineError",
    "EngineOptions",
    "EngineSpec",
    "Inspector",
    "ModelFileError",
    "load",
    "prove_batching",
    "seeded_inputs",
    "threads_per_run",
]
