# SPDX-License-Identifier: Apache-2.0
"""A worker that runs models whose names begin with "twin" on the twin of a device."""

import runpy
from pathlib import Path
from typing import Any

import thirdrail_engines
from support.twins import twin_engine
from thirdrail_engines import EngineOptions, EngineReport, Inspector, LoadedEngine, load
from thirdrail_engines.cuda.twin import TwinDevice

device = TwinDevice()


def load_some_on_twin(
    path: Path, *, options: EngineOptions, inspector: Inspector, **more: Any
) -> LoadedEngine:
    if not path.parent.parent.name.startswith("twin"):
        return load(path, options=options, inspector=inspector, **more)
    engine = twin_engine(path, device, inspector, elements_max=10_000, instances=options.instances)
    return LoadedEngine(engine, EngineReport("twin on cuda"))


if __name__ == "__main__":
    vars(thirdrail_engines)["load"] = load_some_on_twin
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
