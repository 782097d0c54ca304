# SPDX-License-Identifier: Apache-2.0
"""The server's figures as Prometheus metrics: names, help texts and units. Pure code."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from thirdrail.v1.metrics_pb2 import EngineCounters, ModelCounters, SnapshotResponse, WorkerStatus

NS_PER_S = 1e9
MODEL = ("model", "version")

# What -> how requests can end.
OUTCOMES = {
    "ok": "requests_ok",
    "failed": "requests_failed",
    "refused": "requests_refused",
    "timed_out": "requests_timed_out",
    "cancelled": "requests_cancelled",
}

# name (without _total), field, help
_SUMS = (
    ("rows", "rows", "Inferences: rows of all requests that succeeded."),
    ("batches", "batches", "Runs of the engine."),
)
_TIMES = (
    ("queue", "queue_ns", "Time that requests spent in the queue."),
    ("input_copy", "input_copy_ns", "Time spent gathering batches."),
    ("compute", "compute_ns", "Time that the engine ran."),
    ("output_copy", "output_copy_ns", "Time spent handing out results."),
    ("request", "total_ns", "Time from receipt to reply, of requests that succeeded."),
    ("failed_request", "failed_ns", "Time from receipt to reply, of all other requests."),
)
_ENGINE_SUMS = (
    ("plan_cache_hits", "cache_hits", "Loads that found their plan in the cache."),
    ("plan_cache_misses", "cache_misses", "Loads that had their plan built."),
    ("plan_build_seconds", "build_ns", "Time that these builds took."),
    ("engine_fallbacks", "fallbacks", "Loads that came to another engine than the first choice."),
)
_PROOF_FIGURES = (
    ("max_abs_error", "max_abs_error", "Largest difference to the reference on the CPU."),
    ("mean_abs_error", "mean_abs_error", "Mean difference to the reference on the CPU."),
    ("max_rel_error", "max_rel_error", "Largest difference, by the output's largest magnitude."),
    ("cosine", "cosine", "1: the same direction as the output of the reference on the CPU."),
)
_GAUGES = (
    ("queued_requests", "queued", "Requests that wait now."),
    ("running_requests", "running", "Requests that the engine runs now."),
    ("model_memory_bytes", "memory_bytes", "Memory of the engine while nothing runs."),
)


def prometheus_text(snapshot: SnapshotResponse) -> str:
    """The text format that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(snapshot))
    return generate_latest(registry).decode()


class _Figures(Collector):
    def __init__(self, snapshot: SnapshotResponse) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        info = GaugeMetricFamily("thirdrail_info", "The server's version.", labels=("version",))
        info.add_metric((snapshot.server_version,), 1)
        yield info
        uptime = snapshot.uptime_ns / NS_PER_S
        yield GaugeMetricFamily("thirdrail_uptime_seconds", "Since the server started.", uptime)
        yield GaugeMetricFamily(
            "thirdrail_regions", "Shared memory regions of KServe clients.", snapshot.regions
        )
        yield GaugeMetricFamily("thirdrail_region_bytes", "Their sizes.", snapshot.region_bytes)
        yield from _of_models(list(snapshot.models))
        yield from _of_engines(list(snapshot.engines))
        yield from _of_workers(list(snapshot.workers))


def _of_models(models: list[ModelCounters]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "thirdrail_requests", "Requests by how they ended.", labels=(*MODEL, "outcome")
    )
    for model in models:
        for outcome, field in OUTCOMES.items():
            requests.add_metric((*_labels(model), outcome), getattr(model, field))
    yield requests
    for name, field, text in _SUMS:
        yield _counter(f"thirdrail_{name}", text, models, field, 1)
    for name, field, text in _TIMES:
        yield _counter(f"thirdrail_{name}_seconds", text, models, field, NS_PER_S)
    yield _batch_sizes(models)
    for name, field, text in _GAUGES:
        gauge = GaugeMetricFamily(f"thirdrail_{name}", text, labels=MODEL)
        for model in models:
            gauge.add_metric(_labels(model), getattr(model, field))
        yield gauge


def _counter(
    name: str, text: str, models: list[ModelCounters], field: str, divisor: float
) -> Metric:
    counter = CounterMetricFamily(name, text, labels=MODEL)
    for model in models:
        counter.add_metric(_labels(model), getattr(model, field) / divisor)
    return counter


def _batch_sizes(models: list[ModelCounters]) -> Metric:
    sizes = CounterMetricFamily(
        "thirdrail_batches_by_rows",
        "Runs of the engine by the rows that they had.",
        labels=(*MODEL, "rows"),
    )
    for model in models:
        for each in model.batch_sizes:
            sizes.add_metric((*_labels(model), str(each.rows)), each.batches)
    return sizes


def _of_engines(engines: list[EngineCounters]) -> Iterator[Metric]:
    for name, field, text in _ENGINE_SUMS:
        counter = CounterMetricFamily(f"thirdrail_{name}", text, labels=MODEL)
        for each in engines:
            value = getattr(each, field)
            counter.add_metric(_labels(each), value / NS_PER_S if field == "build_ns" else value)
        yield counter
    for name, field, text in _PROOF_FIGURES:
        labels = (*MODEL, "output", "reference")
        gauge = GaugeMetricFamily(f"thirdrail_proof_{name}", text, labels=labels)
        for each in engines:
            for proof in each.proofs:
                if proof.compared:
                    values = (*_labels(each), proof.output, each.proof_reference)
                    gauge.add_metric(values, getattr(proof, field))
        yield gauge


def _of_workers(workers: list[WorkerStatus]) -> Iterator[Metric]:
    restarts = CounterMetricFamily(
        "thirdrail_worker_restarts", "Starts after a death.", labels=("worker",)
    )
    evictions = CounterMetricFamily(
        "thirdrail_worker_evictions",
        "Models that left the worker's memory to make room for others.",
        labels=("worker",),
    )
    gauges = {
        "is_serving": ("thirdrail_worker_up", "1 while the worker serves."),
        "resident_bytes": ("thirdrail_worker_resident_bytes", "Memory of the worker."),
        "model_bytes": ("thirdrail_worker_model_bytes", "Memory of all engines."),
        "model_bytes_max": (
            "thirdrail_worker_model_bytes_max",
            "The budget for it; 0: there is none.",
        ),
        "sessions": ("thirdrail_worker_sessions", "Lanes, the front's included."),
        "sessions_ended": (
            "thirdrail_worker_sessions_ended",
            "Sessions that have ended and whose memory is not given back yet.",
        ),
        "leases": ("thirdrail_worker_leases", "Results in shared memory that clients hold."),
        "leased_bytes": ("thirdrail_worker_leased_bytes", "The memory of these."),
        "shared_bytes": (
            "thirdrail_worker_shared_bytes",
            "Memory of tensors that clients hand to each other.",
        ),
    }
    for worker in workers:
        restarts.add_metric((worker.name,), worker.restarts)
        evictions.add_metric((worker.name,), worker.evictions)
    yield restarts
    yield evictions
    for field, (name, text) in gauges.items():
        gauge = GaugeMetricFamily(name, text, labels=("worker",))
        for worker in workers:
            gauge.add_metric((worker.name,), getattr(worker, field))
        yield gauge
    arenas = GaugeMetricFamily(
        "thirdrail_worker_arena_bytes",
        "Memory shared with lanes: inputs by clients, outputs by the worker.",
        labels=("worker", "role"),
    )
    refusals = CounterMetricFamily(
        "thirdrail_worker_attach_refusals",
        "Clients that the lane turned away.",
        labels=("worker", "reason"),
    )
    for worker in workers:
        arenas.add_metric((worker.name, "input"), worker.input_bytes)
        arenas.add_metric((worker.name, "output"), worker.output_bytes)
        for each in worker.attach_refusals:
            refusals.add_metric((worker.name, each.reason), each.clients)
    yield arenas
    yield refusals


def _labels(model: ModelCounters | EngineCounters) -> tuple[str, str]:
    return model.name, str(model.version)
