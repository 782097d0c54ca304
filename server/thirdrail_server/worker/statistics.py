# SPDX-License-Identifier: Apache-2.0
"""What one model version has done: sums that only grow, kept by those who do it."""

import dataclasses
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

from thirdrail.errors import Cancelled, QueueFull, ThirdrailError, TimedOut
from thirdrail.v1 import metrics_pb2
from thirdrail_server.worker.execution import Execution


@dataclass(slots=True)
class _Sums:
    """ModelCounters' fields of the same names. Plain numbers: a message's take longer to add to."""

    requests_ok: int = 0
    requests_failed: int = 0
    requests_refused: int = 0
    requests_timed_out: int = 0
    requests_cancelled: int = 0
    rows: int = 0
    batches: int = 0
    queue_ns: int = 0
    input_copy_ns: int = 0
    compute_ns: int = 0
    output_copy_ns: int = 0
    total_ns: int = 0
    failed_ns: int = 0
    last_request_unix_ms: int = 0


@dataclass(slots=True)
class _BatchSums:
    batches: int = 0
    input_copy_ns: int = 0
    compute_ns: int = 0
    output_copy_ns: int = 0


class VersionStatistics:
    """Counters of one model version. Times are nanoseconds. Any thread may count."""

    def __init__(self, model: str, version: int) -> None:
        self._model, self._version = model, version
        self._sums = _Sums()
        self._lock = threading.Lock()
        self._by_rows: defaultdict[int, _BatchSums] = defaultdict(_BatchSums)

    def continue_from(self, older: "VersionStatistics") -> None:
        """Take over the sums of the version that this one replaces: counters never go down.

        What the older one still finishes is counted too: they share the sums from now on.
        """
        self._sums, self._by_rows, self._lock = older._sums, older._by_rows, older._lock

    def batch_ran(self, rows: int, execution: Execution) -> None:
        with self._lock:
            sums, batch = self._sums, self._by_rows[rows]
            sums.batches += 1
            sums.input_copy_ns += execution.input_copy_ns
            sums.compute_ns += execution.compute_ns
            sums.output_copy_ns += execution.output_copy_ns
            batch.batches += 1
            batch.input_copy_ns += execution.input_copy_ns
            batch.compute_ns += execution.compute_ns
            batch.output_copy_ns += execution.output_copy_ns

    def request_succeeded(self, rows: int, queue_ns: int, total_ns: int) -> None:
        with self._lock:
            sums = self._sums
            sums.requests_ok += 1
            sums.rows += rows
            sums.queue_ns += queue_ns
            sums.total_ns += total_ns
            sums.last_request_unix_ms = time.time_ns() // 1_000_000

    def request_failed(self, error: ThirdrailError, total_ns: int) -> None:
        with self._lock:
            sums = self._sums
            if isinstance(error, QueueFull):
                sums.requests_refused += 1
            elif isinstance(error, TimedOut):
                sums.requests_timed_out += 1
            elif isinstance(error, Cancelled):
                sums.requests_cancelled += 1
            else:
                sums.requests_failed += 1
            sums.failed_ns += total_ns

    @property
    def last_request_unix_ms(self) -> int:
        """Of those that succeeded; 0: none has."""
        return self._sums.last_request_unix_ms

    def snapshot(
        self, *, queued: int, running: int, memory_bytes: int = 0
    ) -> metrics_pb2.ModelCounters:
        """As of one moment: no run is in it by half."""
        with self._lock:
            return self._snapshot(queued, running, memory_bytes)

    def _snapshot(self, queued: int, running: int, memory_bytes: int) -> metrics_pb2.ModelCounters:
        counters = metrics_pb2.ModelCounters(
            name=self._model,
            version=self._version,
            queued=queued,
            running=running,
            memory_bytes=memory_bytes,
            **dataclasses.asdict(self._sums),
        )
        for rows, batch in sorted(self._by_rows.items()):
            counters.batch_sizes.add(
                rows=rows,
                batches=batch.batches,
                input_copy_ns=batch.input_copy_ns,
                compute_ns=batch.compute_ns,
                output_copy_ns=batch.output_copy_ns,
            )
        return counters
