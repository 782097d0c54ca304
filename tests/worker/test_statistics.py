# SPDX-License-Identifier: Apache-2.0
"""A model version's counters, while several threads count."""

import sys
import threading

import pytest

from thirdrail_server.worker.execution import Execution
from thirdrail_server.worker.statistics import VersionStatistics

RUN = Execution([], input_copy_ns=1, compute_ns=2, output_copy_ns=3)


@pytest.mark.slow
def test_a_snapshot_is_of_one_moment() -> None:
    statistics, is_over = VersionStatistics("m", 1), threading.Event()

    def count() -> None:
        rows = 0
        while not is_over.is_set():
            rows = rows % 8 + 1
            statistics.batch_ran(rows, RUN)

    other = threading.Thread(target=count)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        other.start()
        snapshots = [statistics.snapshot(queued=0, running=0) for _ in range(500)]
    finally:
        is_over.set()
        other.join()
        sys.setswitchinterval(switch_s)
    for each in snapshots:
        assert each.batches == sum(size.batches for size in each.batch_sizes)
        assert each.compute_ns == 2 * each.batches
