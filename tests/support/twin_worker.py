# SPDX-License-Identifier: Apache-2.0
"""A worker that runs models whose names begin with "twin" on the twin of a device.

On one whose name begins with "twin_stuck", a run with index 3 never ends.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import thirdrail_engines
from support.twins import twin_engine
from thirdrail_engines import EngineOptions, EngineReport, Inspector, LoadedEngine, load
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TwinDevice

STUCK_S = 0.75  # and as long again for its one member

device = TwinDevice()


def load_some_on_twin(
    path: Path, *, options: EngineOptions, inspector: Inspector, **more: Any
) -> LoadedEngine:
    if not path.parent.parent.name.startswith("twin"):
        return load(path, options=options, inspector=inspector, **more)
    options_here: dict[str, Any] = {"instances": options.instances}
    is_stuck = path.parent.parent.name.startswith("twin_stuck")
    if is_stuck:
        options_here["run_s_max"] = STUCK_S
    engine = twin_engine(path, device, inspector, elements_max=10_000, **options_here)
    if is_stuck:
        vars(engine)["run"] = sometimes_stuck(engine)
    return LoadedEngine(engine, EngineReport("twin on cuda"))


def sometimes_stuck(engine: CudaEngine) -> Callable[..., Any]:
    plain_run = engine.run

    def run(inputs: Any, wanted: Any, into: Any) -> Any:
        if 3 in inputs.get("index", ()):
            for instance in engine._instances:
                for stream in instance._streams:
                    device.stream_of(stream.handle)._gate.clear()
        return plain_run(inputs, wanted, into)

    return run


if __name__ == "__main__":
    vars(thirdrail_engines)["load"] = load_some_on_twin
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
