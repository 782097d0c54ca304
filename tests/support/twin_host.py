# SPDX-License-Identifier: Apache-2.0
"""`python -m support.twin_host serve ...`: a server on a host with two GPUs, which are twins."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from thirdrail.cli import main
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.cuda.twin import TWIN_FACTS
from thirdrail_server.front import devices, process
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker

GPUS = tuple(
    replace(TWIN_FACTS, uuid=f"GPU-{number}{TWIN_FACTS.uuid[5:]}", name=f"twin {number}")
    for number in range(2)
)


def discover() -> tuple[tuple[DeviceFacts, ...], str]:
    return GPUS, ""


def start_twin_worker(arguments: Sequence[str], **more: Any) -> WorkerProcess:
    return start_worker(arguments, (sys.executable, "-m", "support.twin_host_worker"), **more)


if __name__ == "__main__":
    vars(devices)["discover"] = discover
    vars(process)["start_worker"] = start_twin_worker
    main()
