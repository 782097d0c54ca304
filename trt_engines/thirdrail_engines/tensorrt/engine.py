# SPDX-License-Identifier: Apache-2.0
"""From a TensorRT plan's bytes to an engine on a device. Not yet run on a GPU."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thirdrail.dtypes import Buffer
from thirdrail_engines.cuda.device import Device
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.plans import Builder
from thirdrail_engines.tensorrt.api import load_api
from thirdrail_engines.tensorrt.plan_program import PlanProgram

_log = logging.getLogger(__name__)

PLATFORM = "tensorrt_plan"


@dataclass(frozen=True, slots=True)
class KernelNotes:
    """Where finished kernels are kept between processes: beside the plan, for one kind of GPU."""

    read: Callable[[], bytes | None]
    write: Callable[[bytes], None]


def load_plan(
    data: Buffer,
    source: str,
    *,
    builder: Builder,
    device: Device,
    options: CudaOptions = CudaOptions(),  # noqa: B008 - frozen
    notes: KernelNotes | None = None,
    plugins: Sequence[Path] = (),
    may_run_host_code: bool = False,
) -> CudaEngine:
    """source: what the plan is called in messages. The device outlives the engine.

    notes: for TensorRT for RTX, which finishes kernels when a plan is loaded: kept kernels make the
    next load short. Raises ModelFileError; BuildError MISSING without the package; DeviceLost.
    """
    api = load_api(builder)
    device.check()  # gives this thread the device's context
    facts = device.facts
    program = PlanProgram(
        api,
        data,
        source,
        graphs_max=options.graphs_max,
        gpu=f"{facts.name} ({facts.capability_name})",
        plugins=plugins,
        may_run_host_code=may_run_host_code,
        cached_kernels=notes.read() if notes is not None else None,
    )
    keeper = _Keeper(program, notes)
    engine = CudaEngine(
        program,
        device,
        PLATFORM,
        dataclasses.replace(options, graphs_max=program.choices.our_graphs_max),
        on_close=keeper.keep,
    )
    keeper.keep()
    return engine


class _Keeper:
    """Writes finished kernels down: after a load, for a process that is killed, and at the end."""

    def __init__(self, program: PlanProgram, notes: KernelNotes | None) -> None:
        self._program = program
        self._notes = notes
        self._kept = notes.read() if notes is not None else None

    def keep(self) -> None:
        if self._notes is None:
            return
        kernels = self._program.kernels()
        if not kernels or kernels == self._kept:
            return
        _log.debug("keeping finished kernels of %d bytes", len(kernels))
        self._notes.write(kernels)
        self._kept = kernels
