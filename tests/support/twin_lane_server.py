# SPDX-License-Identifier: Apache-2.0
"""`python -m support.twin_lane_server serve ...`: support.twin_gpu_server, with a lane's twin."""

import sys
from collections.abc import Sequence
from typing import Any

from support.twin_gpu_server import one_twin
from thirdrail.cli import main
from thirdrail_server.front import process
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker


def start_twin_worker(arguments: Sequence[str], *more: Any, **named: Any) -> WorkerProcess:
    command = (sys.executable, "-m", "support.twin_lane_worker")
    return start_worker(arguments, command, *more, **named)


if __name__ == "__main__":
    vars(process)["start_worker"] = start_twin_worker
    vars(process)["find_devices"] = one_twin
    main()
