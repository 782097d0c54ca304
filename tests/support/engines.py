# SPDX-License-Identifier: Apache-2.0
"""Real engines with something in front of them: time that they take, gates, faults."""

import threading
import time
from collections.abc import Mapping, Sequence

from thirdrail.tensors import Array
from thirdrail_engines import Engine, EngineError, EngineOptions
from thirdrail_engines.engine import EngineSpec

GATE_S_MAX = 60


class WatchedEngine:
    """Runs the engine behind it, and remembers on which threads.

    cpu_ns, sleep_s: what each run takes besides. fault: raised after that, instead of a result.
    gate: while it is not set, runs wait; `entered` counts those that have come so far. `let_go` is
    for those alone: whoever comes later waits at another gate.
    """

    def __init__(self, engine: Engine, options: EngineOptions | None = None) -> None:
        self._engine = engine
        self.options = options  # that it was loaded with
        self.cpu_ns = 0
        self.sleep_s = 0.0
        self.fault: EngineError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.threads: list[str] = []
        self.closed = threading.Event()

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    def run(
        self, inputs: Mapping[str, Array], wanted: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        self.threads.append(threading.current_thread().name)
        gate = self.gate
        self.entered.release()
        assert gate.wait(GATE_S_MAX)
        time.sleep(self.sleep_s)
        until_ns = time.thread_time_ns() + self.cpu_ns
        while time.thread_time_ns() < until_ns:
            pass
        if self.fault is not None:
            raise self.fault
        return self._engine.run(inputs, wanted, into)

    def let_go(self) -> None:
        gate, self.gate = self.gate, threading.Event()
        gate.set()

    def close(self) -> None:
        self._engine.close()
        self.closed.set()
