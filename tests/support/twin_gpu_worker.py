# SPDX-License-Identifier: Apache-2.0
"""A worker of support.twin_gpu_server: the one of the twin has it as its device."""

import runpy

import thirdrail_engines
from support import twin_worker
from thirdrail_engines import cuda_engines

if __name__ == "__main__":
    vars(thirdrail_engines)["load"] = twin_worker.load_some_on_twin
    vars(cuda_engines)["own_device"] = lambda uuid: twin_worker.device
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
