# SPDX-License-Identifier: Apache-2.0
"""`python -m support.twin_server serve ...`: a server with support.twin_worker as its worker."""

import sys
from collections.abc import Sequence
from typing import Any

from thirdrail.cli import main
from thirdrail_server.front import process
from thirdrail_server.front.control.worker_process import WorkerProcess, start_worker


def start_twin_worker(arguments: Sequence[str], **more: Any) -> WorkerProcess:
    return start_worker(arguments, (sys.executable, "-m", "support.twin_worker"), **more)


if __name__ == "__main__":
    vars(process)["start_worker"] = start_twin_worker
    main()
