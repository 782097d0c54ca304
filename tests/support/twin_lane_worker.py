# SPDX-License-Identifier: Apache-2.0
"""support.twin_worker, whose device is that of the lane as well.

While the file $THIRDRAIL_TEST_GATE exists, the device computes nothing.
"""

import os
import runpy
import time
from collections.abc import Mapping

import thirdrail_engines
from support import twin_worker
from thirdrail.tensors import Array
from thirdrail_engines import cuda_engines
from thirdrail_engines.cuda.device import Capabilities
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda.twin_program import TwinProgram

GATE = os.environ.get("THIRDRAIL_TEST_GATE", "")
SHARES = Capabilities(has_virtual_memory=True, has_posix_fds=True, has_ipc_events=True)

compute = TwinProgram.compute


def compute_when_let(self: TwinProgram, feed: Mapping[str, Array]) -> dict[str, Array]:
    while os.path.exists(GATE):
        time.sleep(0.002)
    return compute(self, feed)


if __name__ == "__main__":
    device = vars(twin_worker)["device"] = TwinDevice(capabilities=SHARES)
    vars(thirdrail_engines)["load"] = twin_worker.load_some_on_twin
    vars(cuda_engines)["own_device"] = lambda uuid: device
    setattr(TwinProgram, "compute", compute_when_let)  # noqa: B010
    runpy.run_module("thirdrail_server.worker", run_name="__main__")
