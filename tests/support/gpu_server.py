# SPDX-License-Identifier: Apache-2.0
"""`python -m support.gpu_server serve ...`: its workers can be made to lose their GPU."""

import sys
from collections.abc import Sequence
from typing import Any

from thirdrail.cli import main
from thirdrail_server.front import process
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker


def start_wild_worker(arguments: Sequence[str], *more: Any, **named: Any) -> WorkerProcess:
    command = (sys.executable, "-m", "support.gpu_worker")
    return start_worker(arguments, command, *more, **named)


if __name__ == "__main__":
    vars(process)["start_worker"] = start_wild_worker
    main()
