# SPDX-License-Identifier: Apache-2.0
"""Two snapshots of the server's counters -> what it did in between. Pure: no clock, no I/O."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from thirdrail.v1 import metrics_pb2 as pb


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One version of one model during an interval. Means are None where nothing happened."""

    name: str
    version: int
    requests_per_s: float  # that succeeded
    rows_per_s: float
    not_ok_per_s: float  # failed, refused, timed out or cancelled
    batch_rows_mean: float | None
    latency_ms_mean: float | None  # from receipt to reply
    queue_ms_mean: float | None
    compute_ms_mean: float | None  # of one batch
    queued: int  # now
    running: int  # now


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    name: str
    pid: int
    is_serving: bool
    restarts: int
    resident_bytes: int
    sessions: int
    arena_bytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    server_version: str
    uptime_s: float
    interval_s: float
    models: tuple[ModelFigures, ...]
    workers: tuple[WorkerFigures, ...]


def figures_between(before: pb.SnapshotResponse, after: pb.SnapshotResponse) -> Figures:
    """`before` may be empty: then the figures are those since the server's start.

    A server that was restarted in between counts from zero again, and so do we.
    """
    if after.uptime_ns <= before.uptime_ns:
        before = pb.SnapshotResponse()
    interval_s = (after.uptime_ns - before.uptime_ns) / 1e9
    earlier = {(m.name, m.version): m for m in before.models}
    zero = pb.ModelCounters()
    return Figures(
        server_version=after.server_version,
        uptime_s=after.uptime_ns / 1e9,
        interval_s=interval_s,
        models=tuple(
            _model_figures(earlier.get((m.name, m.version), zero), m, interval_s)
            for m in sorted(after.models, key=lambda m: (m.name, m.version))
        ),
        workers=tuple(_worker_figures(worker) for worker in after.workers),
    )


_NOT_OK = ("requests_failed", "requests_refused", "requests_timed_out", "requests_cancelled")


def _model_figures(
    before: pb.ModelCounters, after: pb.ModelCounters, interval_s: float
) -> ModelFigures:
    def delta(field: str) -> int:
        # A version that was unloaded and loaded again counts from zero.
        return max(0, int(getattr(after, field)) - int(getattr(before, field)))

    requests, batches, rows = delta("requests_ok"), delta("batches"), delta("rows")
    return ModelFigures(
        name=after.name,
        version=after.version,
        requests_per_s=_per(requests, interval_s) or 0.0,
        rows_per_s=_per(rows, interval_s) or 0.0,
        not_ok_per_s=_per(sum(map(delta, _NOT_OK)), interval_s) or 0.0,
        batch_rows_mean=_per(rows, batches),
        latency_ms_mean=_per(delta("total_ns") / 1e6, requests),
        queue_ms_mean=_per(delta("queue_ns") / 1e6, requests),
        compute_ms_mean=_per(delta("compute_ns") / 1e6, batches),
        queued=after.queued,
        running=after.running,
    )


def _worker_figures(worker: pb.WorkerStatus) -> WorkerFigures:
    return WorkerFigures(
        name=worker.name,
        pid=worker.pid,
        is_serving=worker.is_serving,
        restarts=worker.restarts,
        resident_bytes=worker.resident_bytes,
        sessions=worker.sessions,
        arena_bytes=worker.arena_bytes,
    )


def dict_of_message(message: Message) -> dict[str, Any]:
    """A message of plain fields for JSON: numbers stay numbers, and zeros are there."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None:
            value = [dict_of_message(item) for item in value]
        found[field.name] = value
    return found


def _per(amount: float, count: float) -> float | None:
    return amount / count if count else None
