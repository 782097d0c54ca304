# SPDX-License-Identifier: Apache-2.0
"""TensorRT plans on the CUDA device of this process. Not yet run on a GPU."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.engine import Engine
from thirdrail_engines.host import cuda_devices, why_no_cuda_device
from thirdrail_engines.plans import Builder, BuildError, BuildFault, PlanRequest

if TYPE_CHECKING:  # imported late: they are for hosts with a GPU, and for models that need a plan
    from thirdrail_engines.compiling import CompileServices
    from thirdrail_engines.cuda.device import Device
    from thirdrail_engines.cuda.engine import CudaEngine
    from thirdrail_engines.plan_cache import Plan, PlanCache
    from thirdrail_engines.tensorrt.engine import KernelNotes


def facts_for(engine: str, services: "CompileServices") -> DeviceFacts:
    """Of the device that engines go to. engine: whose need it is, for the error.

    Raises BuildError MISSING where there is none.
    """
    if services.device is not None:
        return services.device.facts
    devices = cuda_devices()
    if not devices:
        raise BuildError(BuildFault.MISSING, f"{engine} needs a GPU: {why_no_cuda_device()}")
    return devices[0]


def is_cuda(engine: Engine) -> "TypeGuard[CudaEngine]":
    """Whether it works in a device's memory. A worker for the CPU never imports such an engine."""
    if not engine.spec.overlapped_runs:
        return False
    from thirdrail_engines.cuda.engine import CudaEngine

    return isinstance(engine, CudaEngine)


def open_bare_plan(
    data: bytes, path: Path, builder: Builder, services: "CompileServices"
) -> Engine:
    """Raises ModelFileError, BuildError MISSING, DeviceLost."""
    from thirdrail_engines.tensorrt.engine import load_plan

    device = _device(builder, services)
    return load_plan(data, path.name, builder=builder, device=device, options=services.cuda)


def open_plan(
    plan: "Plan", request: PlanRequest, services: "CompileServices", instances: int
) -> Engine:
    """Raises ModelFileError, BuildError MISSING, DeviceLost."""
    from thirdrail_engines.tensorrt.engine import load_plan

    device = _device(request.builder, services)
    return load_plan(
        bytes(plan.data),
        request.source.name,
        builder=request.builder,
        device=device,
        options=dataclasses.replace(services.cuda, instances=instances),
        notes=_kernel_notes(plan, device.facts, services.cache),
        plugins=request.plugins,
        may_run_host_code=request.is_version_compatible,
    )


def _device(engine: str, services: "CompileServices") -> "Device":
    facts = facts_for(engine, services)
    return services.device if services.device is not None else own_device(facts.uuid)


@functools.cache
def own_device(uuid: str) -> "Device":
    """For the length of the process: where nobody gives one, nobody closes it either."""
    from thirdrail_engines.cuda.driver import open_device

    return open_device(uuid)


def _kernel_notes(
    plan: "Plan", facts: DeviceFacts, cache: "PlanCache | None"
) -> "KernelNotes | None":
    """Finished kernels lie beside the plan: one file for each kind of GPU and driver."""
    from thirdrail_engines.tensorrt.engine import KernelNotes

    if cache is None:
        return None
    about = dataclasses.replace(plan, data=memoryview(b""))  # the notes outlive the plan's bytes
    name = f"kernels-{facts.capability_name}-cuda{'.'.join(map(str, facts.driver))}"
    return KernelNotes(
        read=lambda: cache.notes(about, name), write=lambda data: cache.note(about, name, data)
    )
