# SPDX-License-Identifier: Apache-2.0
"""The server's counters in the form of ModelStatistics.

Clients take differences over a window, so no figure may ever go down: each is a counter that never
decreases, or a sum of such.
"""

from thirdrail.v1 import metrics_pb2
from thirdrail_server.inference import grpc_service_pb2 as kserve


def model_statistics(
    name: str, version: int, counters: metrics_pb2.ModelCounters | None
) -> kserve.ModelStatistics:
    """The totals of one model version; None: it has not been asked yet."""
    if counters is None:
        counters = metrics_pb2.ModelCounters()
    return kserve.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=counters.last_request_unix_ms,
        inference_count=counters.rows,
        execution_count=counters.batches,
        inference_stats=_request_totals(counters),
        batch_stats=[
            _batch_totals(batch) for batch in sorted(counters.batch_sizes, key=lambda b: b.rows)
        ],
    )


def _request_totals(counters: metrics_pb2.ModelCounters) -> kserve.InferStatistics:
    succeeded = counters.requests_ok
    failed = (
        counters.requests_failed
        + counters.requests_refused
        + counters.requests_timed_out
        + counters.requests_cancelled
    )
    return kserve.InferStatistics(
        success=_duration(succeeded, counters.total_ns),
        fail=_duration(failed, counters.failed_ns),
        queue=_duration(succeeded, counters.queue_ns),
        compute_input=_duration(succeeded, counters.input_copy_ns),
        compute_infer=_duration(succeeded, counters.compute_ns),
        compute_output=_duration(succeeded, counters.output_copy_ns),
        cache_hit=_duration(0, 0),
        cache_miss=_duration(0, 0),
    )


def _batch_totals(batch: metrics_pb2.BatchCounters) -> kserve.InferBatchStatistics:
    return kserve.InferBatchStatistics(
        batch_size=batch.rows,
        compute_input=_duration(batch.batches, batch.input_copy_ns),
        compute_infer=_duration(batch.batches, batch.compute_ns),
        compute_output=_duration(batch.batches, batch.output_copy_ns),
    )


def _duration(count: int, ns: int) -> kserve.StatisticDuration:
    return kserve.StatisticDuration(count=count, ns=ns)
