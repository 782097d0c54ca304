# SPDX-License-Identifier: Apache-2.0
"""Counters that never decrease, made of counters that start at zero with every worker. Pure code.

Whoever reads them takes differences (perf_analyzer, Prometheus), so a step back would be a lie.
The total of a model version is what all earlier workers counted, as last seen, plus what the
present one says. What a worker counted between the last look and its death is lost with it.
"""

from collections.abc import Iterable

from thirdrail.v1.metrics_pb2 import BatchCounters, ModelCounters

# Told as they are now. All other number fields are sums.
GAUGES = ("queued", "running", "memory_bytes")
LATEST = "last_request_unix_ms"
_KEYS = ("name", "version", "rows", LATEST, "batch_sizes", *GAUGES)

SUMS = ("rows", *(f.name for f in ModelCounters.DESCRIPTOR.fields if f.name not in _KEYS))
BATCH_SUMS = tuple(f.name for f in BatchCounters.DESCRIPTOR.fields if f.name != "rows")

VERSIONS_MAX = 100_000  # counted since the server started; one more is not counted

Key = tuple[str, int]


class CounterBook:
    """Totals per model version. `observe` what the worker says, `restart` when it died."""

    def __init__(self) -> None:
        self._base: dict[Key, ModelCounters] = {}  # of earlier workers and earlier loads
        self._latest: dict[Key, ModelCounters] = {}  # of the present worker

    def observe(self, counters: Iterable[ModelCounters]) -> None:
        """Take all of a worker's counters. A version that is missing or went back was unloaded."""
        now = {(each.name, each.version): each for each in counters}
        for key, before in list(self._latest.items()):
            if key not in now or _went_back(before, now[key]):
                self._fold(key)
        for key, each in now.items():
            if key in self._base or key in self._latest or self._count < VERSIONS_MAX:
                self._latest[key] = ModelCounters()
                self._latest[key].CopyFrom(each)

    def restart(self) -> None:
        """The worker died: the next one counts from zero."""
        for key in list(self._latest):
            self._fold(key)

    def totals(self) -> list[ModelCounters]:
        """By name and version. The caller may keep and change them."""
        totals = []
        for key in sorted(self._base.keys() | self._latest.keys()):
            total = ModelCounters(name=key[0], version=key[1])
            for part in (self._base.get(key), self._latest.get(key)):
                if part is not None:
                    _add(total, part)
            totals.append(total)
        return totals

    @property
    def _count(self) -> int:
        return len(self._base.keys() | self._latest.keys())

    def _fold(self, key: Key) -> None:
        """Move a version's latest counters into its base."""
        latest = self._latest.pop(key)
        for gauge in GAUGES:
            latest.ClearField(gauge)  # type: ignore[arg-type]
        base = self._base.setdefault(key, ModelCounters(name=key[0], version=key[1]))
        _add(base, latest)


def summed(parts: Iterable[Iterable[ModelCounters]]) -> list[ModelCounters]:
    """What several workers count together, by name and version."""
    totals: dict[Key, ModelCounters] = {}
    for each in (counters for part in parts for counters in part):
        key = each.name, each.version
        total = totals.setdefault(key, ModelCounters(name=each.name, version=each.version))
        _add(total, each)
    return [totals[key] for key in sorted(totals)]


def _add(total: ModelCounters, part: ModelCounters) -> None:
    for name in (*SUMS, *GAUGES):
        setattr(total, name, getattr(total, name) + getattr(part, name))
    total.last_request_unix_ms = max(total.last_request_unix_ms, part.last_request_unix_ms)
    sizes = {each.rows: each for each in total.batch_sizes}
    for each in part.batch_sizes:
        size = sizes.get(each.rows) or total.batch_sizes.add(rows=each.rows)
        sizes[each.rows] = size
        for name in BATCH_SUMS:
            setattr(size, name, getattr(size, name) + getattr(each, name))


def _went_back(before: ModelCounters, now: ModelCounters) -> bool:
    if any(getattr(now, name) < getattr(before, name) for name in (*SUMS, LATEST)):
        return True
    sizes = {each.rows: each for each in now.batch_sizes}
    return any(
        each.rows not in sizes
        or any(getattr(sizes[each.rows], name) < getattr(each, name) for name in BATCH_SUMS)
        for each in before.batch_sizes
    )
