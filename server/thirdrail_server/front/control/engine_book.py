# SPDX-License-Identifier: Apache-2.0
"""Counts what loads said about their engines, over the lives of all workers. Pure code."""

from collections.abc import Iterator, Mapping

from thirdrail.v1.metrics_pb2 import EngineCounters
from thirdrail_server.control_messages import VersionEngine

VERSIONS_MAX = 100_000  # counted since the server started; one more is not counted


class EngineBook:
    """Sums per model version, and the proof of its present engine."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, int], EngineCounters] = {}

    def loaded(self, name: str, engines: Mapping[int, VersionEngine]) -> None:
        """A load came to these engines, by version."""
        for version, engine in engines.items():
            counters = self._of(name, version)
            if counters is not None:
                _count(counters, engine)

    def counters(self) -> Iterator[EngineCounters]:
        """By name and version."""
        for key in sorted(self._counters):
            yield self._counters[key]

    def _of(self, name: str, version: int) -> EngineCounters | None:
        counters = self._counters.get((name, version))
        if counters is None and len(self._counters) < VERSIONS_MAX:
            counters = EngineCounters(name=name, version=version)
            self._counters[name, version] = counters
        return counters


def _count(counters: EngineCounters, engine: VersionEngine) -> None:
    report = engine.report
    if report.plan_key and report.is_cache_hit:
        counters.cache_hits += 1
    elif report.plan_key:
        counters.cache_misses += 1
        counters.build_ns += report.build_ns
    if engine.reason and not engine.is_stopgap:
        counters.fallbacks += 1
    del counters.proofs[:]
    counters.proofs.extend(report.proofs)
    counters.proof_reference = report.proof_reference
