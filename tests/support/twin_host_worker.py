# SPDX-License-Identifier: Apache-2.0
"""A worker whose device, if it was told one, is a twin that all its models run on.

A model takes as much of the device's memory as its file has bytes.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import thirdrail_engines
from support.twin_host import GPUS
from support.twins import any_size
from thirdrail_engines import (
    EngineOptions,
    EngineReport,
    Inspector,
    LoadedEngine,
    cuda_engines,
    load,
)
from thirdrail_engines.cuda.device import Capabilities
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda.twin_program import TwinProgram

SHARES = Capabilities(has_virtual_memory=True, has_posix_fds=True, has_ipc_events=True)
ELEMENTS_MAX = 64  # of a tensor with an open dimension

_twins: dict[str, TwinDevice] = {}


def twin(uuid: str) -> TwinDevice:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == uuid, "a worker sees its own device alone"
    (facts,) = [each for each in GPUS if each.uuid == uuid]
    return _twins.setdefault(uuid, TwinDevice(facts, capabilities=SHARES))


class Weighty(TwinProgram):
    """Whose weights are in the device's memory."""

    def __init__(self, path: Path, device: TwinDevice, inspector: Inspector) -> None:
        super().__init__(path, device, any_size(path, inspector, ELEMENTS_MAX), inspector)
        self._memory, self._weights = device, device.allocate(path.stat().st_size)

    def close(self) -> None:
        self._memory.free(self._weights)
        super().close()


def load_on(uuid: str) -> Any:
    def load_on_twin(
        path: Path, *, options: EngineOptions, inspector: Inspector, **more: Any
    ) -> LoadedEngine:
        if not uuid:
            return load(path, options=options, inspector=inspector, **more)
        device = twin(uuid)
        program = Weighty(path, device, inspector)
        ran_by = CudaOptions(instances=options.instances)
        engine = CudaEngine(program, device, "tensorrt_plan", ran_by)
        return LoadedEngine(engine, EngineReport("twin on cuda"))

    return load_on_twin


if __name__ == "__main__":
    config = json.loads(sys.argv[sys.argv.index("--config") + 1])
    vars(cuda_engines)["own_device"] = twin
    vars(thirdrail_engines)["load"] = load_on(config["device"])
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
