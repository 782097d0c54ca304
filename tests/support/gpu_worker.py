# SPDX-License-Identifier: Apache-2.0
"""A worker with a GPU. In models whose names begin with "wild", an input `index` of 9 launches a
kernel that makes every later call fail. Not yet run on a GPU."""

import runpy
from pathlib import Path
from typing import Any

import thirdrail_engines
from support import wild_kernel
from thirdrail_engines import LoadedEngine, cuda_engines, load


def load_some_wild(path: Path, **more: Any) -> LoadedEngine:
    loaded = load(path, **more)
    if path.parent.parent.name.startswith("wild"):
        plain_run = loaded.engine.run

        def run(inputs: Any, wanted: Any, into: Any) -> Any:
            if 9 in inputs["index"]:
                device = cuda_engines.own_device("")
                stream = device.new_stream()
                wild_kernel.launch(device, stream)
                stream.synchronize()  # raises DeviceLost
            return plain_run(inputs, wanted, into)

        vars(loaded.engine)["run"] = run
    return loaded


if __name__ == "__main__":
    vars(thirdrail_engines)["load"] = load_some_wild
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
