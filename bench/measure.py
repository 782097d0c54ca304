# SPDX-License-Identifier: Apache-2.0
"""How things are compared: short slices of each contender in turn, so that a busy host hits all.

Ratios are formed within a round (one slice of each) and shown as the median round with the lowest
and highest beside it. A figure for which the rounds disagree is worth little, and the spread says
so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

SLICE_S = 0.5
WARM_UP_S = 0.2
ROUNDS_MIN = 3

Latencies = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slice:
    """One turn of one contender."""

    latencies_us: Latencies  # of each call
    elapsed_s: float
    client_cpu_s: float  # of the load generator's process
    server_cpu_s: tuple[float, ...] = ()  # per process role of the server

    @property
    def calls_per_s(self) -> float:
        return len(self.latencies_us) / self.elapsed_s

    @property
    def p50_us(self) -> float:
        return float(np.percentile(self.latencies_us, 50))

    @property
    def p99_us(self) -> float:
        return float(np.percentile(self.latencies_us, 99))


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that can be put under load for some seconds.

    server_cpu_s: CPU seconds that its server has used so far, per process role.
    """

    name: str
    run: Callable[[float], Slice]
    server_cpu_s: Callable[[], tuple[float, ...]] = tuple


@dataclass(slots=True)
class Series:
    """All slices of one contender. Latencies are of all calls together, rates of the median
    slice."""

    name: str
    slices: list[Slice] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return sum(len(each.latencies_us) for each in self.slices)

    @property
    def calls_per_s(self) -> float:
        return float(np.median([each.calls_per_s for each in self.slices]))

    def percentile_us(self, percent: float) -> float:
        together = np.concatenate([each.latencies_us for each in self.slices])
        return float(np.percentile(together, percent))

    @property
    def client_cpu_us(self) -> float:
        """CPU of the load generator for one call."""
        return sum(each.client_cpu_s for each in self.slices) / self.calls * 1e6

    @property
    def server_cpu_us(self) -> list[float]:
        """CPU of the server for one call, per process role."""
        roles = zip(*(each.server_cpu_s for each in self.slices), strict=True)
        return [sum(role) / self.calls * 1e6 for role in roles]


def interleave(contenders: Sequence[Contender], seconds: float) -> list[Series]:
    """Give each contender about `seconds` of load, in slices, in an order that rotates."""
    series = [Series(contender.name) for contender in contenders]
    for contender in contenders:
        contender.run(WARM_UP_S)
    for number in range(max(ROUNDS_MIN, round(seconds / SLICE_S))):
        for turn in range(len(contenders)):
            index = (number + turn) % len(contenders)
            series[index].slices.append(_slice(contenders[index]))
    return series


def _slice(contender: Contender) -> Slice:
    before = contender.server_cpu_s()
    done = contender.run(SLICE_S)
    used = tuple(b - a for a, b in zip(before, contender.server_cpu_s(), strict=True))
    return Slice(done.latencies_us, done.elapsed_s, done.client_cpu_s, used)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure formed in each round: the median round, the lowest and the highest."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


Figure = Callable[[Slice], float]


def ratio(of: Series, to: Series, figure: Figure) -> Spread:
    return _spread(of, to, lambda a, b: figure(a) / figure(b))


def difference(of: Series, to: Series, figure: Figure) -> Spread:
    return _spread(of, to, lambda a, b: figure(a) - figure(b))


def _spread(of: Series, to: Series, combine: Callable[[Slice, Slice], float]) -> Spread:
    rounds = [combine(a, b) for a, b in zip(of.slices, to.slices, strict=True)]
    return Spread(float(np.median(rounds)), min(rounds), max(rounds))


def as_latencies(nanoseconds: Sequence[Any]) -> Latencies:
    return np.asarray(nanoseconds, np.float64) / 1e3
