# SPDX-License-Identifier: Apache-2.0
"""Calls to the server, timed at the caller's end."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from thirdrail.requests import Result
from thirdrail.tensors import Array

Infer = Callable[[str, Mapping[str, Array]], Result]


@dataclass(frozen=True, slots=True)
class Latency:
    """Calls of one kind to one model, from the arrays of the request to those of the answer."""

    model: str
    kind: str
    calls: int
    first_ms: float
    median_ms: float
    batch_rows_max: int  # in the largest batch that one of them ran in; 0: the model does not batch
    transport: str


@dataclass(frozen=True, slots=True)
class _Call:
    elapsed_ms: float
    batch_rows: int
    transport: str


class Stopwatch:
    """Times every call that goes through `infer`. May be used from several threads at once."""

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, str], list[_Call]] = {}

    def infer(self, model: str, inputs: Mapping[str, Array], *, kind: str) -> Result:
        """One call; `kind` is what it is listed under."""
        start_ns = time.perf_counter_ns()
        result = self._infer(model, inputs)
        elapsed_ms = (time.perf_counter_ns() - start_ns) / 1e6
        with self._lock:
            self._calls.setdefault((model, kind), []).append(
                _Call(elapsed_ms, result.timing.batch_rows, result.timing.transport)
            )
        return result

    def latencies(self) -> list[Latency]:
        """In the order of the first calls."""
        return [
            Latency(
                model=model,
                kind=kind,
                calls=len(calls),
                first_ms=calls[0].elapsed_ms,
                median_ms=statistics.median(call.elapsed_ms for call in calls),
                batch_rows_max=max(call.batch_rows for call in calls),
                transport=calls[0].transport,
            )
            for (model, kind), calls in self._calls.items()
        ]
