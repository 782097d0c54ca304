# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.worker import RunningWorker, running_worker
from thirdrail_server.config import LaneLimits, WorkerConfig

LANES = 64
LIMITS = LaneLimits(
    calls_in_flight_max=32, input_arena_bytes_max=64 << 20, output_arena_bytes_max=64 << 20
)


@pytest.fixture(scope="module")
def worker(standard_repository: Path) -> Iterator[RunningWorker]:
    """A worker with small limits and one lane for each test that wants one."""
    with running_worker(WorkerConfig(lane=LIMITS), lanes=LANES) as running:
        running.load(standard_repository)
        yield running
