# SPDX-License-Identifier: Apache-2.0
"""A model version at work, and one session that calls it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from support.engines import WatchedEngine
from support.sessions import Session
from thirdrail.errors import ThirdrailError
from thirdrail.tensors import Array
from thirdrail.v1 import metrics_pb2
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.run_place import RunPlace
from thirdrail_server.worker.served_version import ServedVersion

BOUND_NS = 20_000_000  # longer runs have no place on the loop
TOO_LONG_S = 0.03
ON_LOOP = RunPlace(on_loop=True, overrun_ns_max=BOUND_NS)
WIDE = 1 << 16  # elements: a result of 256 KiB, which takes a slot
X = {"x": np.arange(3, dtype=np.float32)}
ROW = {"a": np.ones((1, 4), np.float32)}
WAIT_S_MAX = 20
DELAY_NS = 100_000_000
DELAYED = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 100000 }"


class Served:
    """A served version on the running loop, and one session that calls it."""

    def __init__(
        self, prepared: PreparedVersion, session: Session, place: RunPlace | None = None
    ) -> None:
        self.engine = WatchedEngine(prepared.engine)
        self.session = session
        self.version = ServedVersion(
            prepared.spec,
            self.engine,
            prepared.options.queue,
            instances=prepared.options.instances,
            place=place or RunPlace(on_loop=False),
        )
        self._loop_thread = threading.current_thread().name

    def submit(
        self,
        inputs: Mapping[str, Array] = X,
        *,
        priority: int = 0,
        timeout_us: int = 0,
        now_ns: int = 0,
    ) -> tuple[Call, "asyncio.Future[Ending]"]:
        """The future fails the test if the call ends twice. now_ns: 0 for the present."""
        ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        member = self.session.member(self.version.spec, inputs)
        now_ns = now_ns or time.monotonic_ns()
        call = Call(member, self.version, lambda _, ending: ended.set_result(ending), now_ns)
        self.version.submit(call, flow=0, priority=priority, timeout_us=timeout_us, now_ns=now_ns)
        return call, ended

    def submit_many(
        self, inputs: Mapping[str, Array], count: int
    ) -> "list[asyncio.Future[Ending]]":
        """At one moment, however long it takes."""
        now_ns = time.monotonic_ns()
        return [self.submit(inputs, now_ns=now_ns)[1] for _ in range(count)]

    async def call(self, inputs: Mapping[str, Array] = X, **options: int) -> Ending:
        return await self.submit(inputs, **options)[1]

    async def entered(self, runs: int = 1) -> None:
        """Until so many further runs have begun."""
        for _ in range(runs):
            assert await asyncio.to_thread(self.engine.entered.acquire, timeout=WAIT_S_MAX)

    def ran_on_loop(self) -> list[bool]:
        """Of each run so far."""
        return [name == self._loop_thread for name in self.engine.threads]

    def counters(self) -> metrics_pb2.ModelCounters:
        return self.version.counters()

    def release(self, *endings: Ending) -> None:
        for ending in endings:
            self.session.release(ending.outcome)


Serving = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


def error_of(ending: Ending, kind: type[ThirdrailError]) -> str:
    assert isinstance(ending.outcome.error, kind)
    return ending.outcome.error.message
