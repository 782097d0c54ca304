# SPDX-License-Identifier: Apache-2.0
"""`python -m support.twin_gpu_server serve ...`: a server on a host that has one GPU, a twin."""

import sys
from collections.abc import Sequence
from typing import Any

from thirdrail.cli import main
from thirdrail_engines.cuda.twin import TWIN_FACTS
from thirdrail_server.config import ServerConfig
from thirdrail_server.front import process
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker
from thirdrail_server.repository.device_choice import CPU, Device


def start_twin_worker(arguments: Sequence[str], *more: Any, **named: Any) -> WorkerProcess:
    command = (sys.executable, "-m", "support.twin_gpu_worker")
    return start_worker(arguments, command, *more, **named)


def one_twin(config: ServerConfig) -> tuple[Device, ...]:
    return (Device(TWIN_FACTS.uuid, TWIN_FACTS.name), CPU)


if __name__ == "__main__":
    vars(process)["start_worker"] = start_twin_worker
    vars(process)["find_devices"] = one_twin
    main()
