# SPDX-License-Identifier: Apache-2.0
"""Engines on the twin of a device, from ONNX files."""

from pathlib import Path
from typing import Any

from thirdrail_engines import Inspector
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda.twin_program import TwinProgram
from thirdrail_engines.onnxruntime_session import open_session, spec_of
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import Profile, ShapeRange


def twin_engine(
    path: Path,
    device: TwinDevice,
    inspector: Inspector,
    *,
    profiles: tuple[Profile, ...] | None = None,
    elements_max: int = 1_200_000,
    activation_bytes: int = 0,
    **options: Any,
) -> CudaEngine:
    """profiles: None for one that takes every open dimension from 0 on, and `elements_max`
    elements."""
    if profiles is None:
        profiles = any_size(path, inspector, elements_max)
    program = TwinProgram(path, device, profiles, inspector, activation_bytes)
    return CudaEngine(program, device, "tensorrt_plan", CudaOptions(**options))


def any_size(path: Path, inspector: Inspector, elements_max: int) -> tuple[Profile, ...]:
    findings = inspector.begin(path).result()
    spec = spec_of(path, open_session(path, EngineOptions()), findings)
    ranges = {
        tensor.name: ShapeRange(
            *(
                tuple(size if dim == -1 else dim for dim in tensor.shape)
                for size in (0, 1, round(elements_max ** (1 / tensor.shape.count(-1))))
            )
        )
        for tensor in spec.inputs
        if -1 in tensor.shape and not tensor.optional
    }
    return (Profile(ranges),) if ranges else ()
