# SPDX-License-Identifier: Apache-2.0
"""A model version at work: where its runs happen, how calls end, what an end leaves behind."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
import pytest

from support.engines import WatchedEngine
from support.models import add, identity
from support.sessions import Session
from thirdrail.errors import (
    Cancelled,
    Internal,
    InvalidArgument,
    QueueFull,
    ThirdrailError,
    TimedOut,
    Unavailable,
)
from thirdrail.tensors import Array
from thirdrail.v1 import metrics_pb2
from thirdrail_engines import EngineError
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.loading import PreparedVersion
from thirdrail_server.worker.run_place import INLINE_INPUT_BYTES_MAX, LargeRuns, RunPlace
from thirdrail_server.worker.served_version import ServedVersion

Prepare = Callable[..., PreparedVersion]

BOUND_NS = 20_000_000  # longer runs have no place on the loop
TOO_LONG_S = 0.03
ON_LOOP = RunPlace(on_loop=True, overrun_ns_max=BOUND_NS)
WIDE = 1 << 16  # elements: a result of 256 KiB, which takes a slot
X = {"x": np.arange(3, dtype=np.float32)}
ROW = {"a": np.ones((1, 4), np.float32)}
WAIT_S_MAX = 20


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


@pytest.fixture
def serving(prepare_model: Prepare, session: Session) -> Callable[..., Any]:
    """async with serving(model, config, place) as served: everything is closed at its end."""

    @contextlib.asynccontextmanager
    async def serve(
        built: Any, config: str = "", place: RunPlace | None = None
    ) -> AsyncIterator[Served]:
        served = Served(prepare_model(built, config), session, place)
        try:
            yield served
        finally:
            served.engine.gate.set()
            if not served.engine.closed.is_set():
                await served.version.retire("the test is over", WAIT_S_MAX)
        assert served.session.output.leased_bytes == 0

    return serve


Serving = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


def error_of(ending: Ending, kind: type[ThirdrailError]) -> str:
    assert isinstance(ending.outcome.error, kind)
    return ending.outcome.error.message


# Where runs happen


async def test_a_tiny_model_runs_on_the_loop_before_submit_returns(serving: Serving) -> None:

    async with serving(identity(), place=ON_LOOP) as served:
        _, ended = served.submit()
        assert ended.done()
        assert served.ran_on_loop() == [True]


async def test_large_inputs_of_a_tiny_model_go_to_a_thread(serving: Serving) -> None:

    async with serving(identity(), place=ON_LOOP) as served:
        large = np.zeros(INLINE_INPUT_BYTES_MAX // 4 + 1, np.float32)
        served.release(await served.call({"x": large}), await served.call())
        assert served.ran_on_loop() == [False, True]


async def test_large_inputs_come_to_the_loop_once_their_runs_were_short(serving: Serving) -> None:
    bound_s, sleep_s = 10, 0.1
    place = RunPlace(on_loop=True, overrun_ns_max=BOUND_NS, large_run_ns_max=bound_s * 10**9)
    async with serving(identity(), place=place) as served:
        large = {"x": np.zeros(INLINE_INPUT_BYTES_MAX // 4 + 1, np.float32)}
        for _ in range(2):  # within the bound on any machine
            served.release(await served.call(large))
        served.engine.sleep_s = sleep_s
        served.release(await served.call(large))
        served.engine.sleep_s = 0
        # So many times the bytes take longer than the bound, as far as is known now.
        longer = {"x": np.zeros(large["x"].size * int(bound_s / sleep_s), np.float32)}
        served.release(await served.call(longer), await served.call())
        assert served.ran_on_loop() == [False, True, True, False, True]
        assert served.version.runs_on_loop, "what large inputs take says nothing of small ones"


def test_runs_are_foretold_by_the_byte() -> None:
    runs = LargeRuns(run_ns_max=1000)
    assert not runs.are_short(1)
    runs.note(100, 100)
    assert runs.are_short(1000)
    assert not runs.are_short(1001)
    runs.note(100, 200)
    assert not runs.are_short(501)
    for _ in range(40):
        runs.note(100, 100)
    assert runs.are_short(980)


async def test_a_run_that_was_only_interrupted_costs_one_trial(serving: Serving) -> None:
    """A busy host makes runs long, but not the CPU time that they take."""
    async with serving(identity(), place=ON_LOOP) as served:
        served.engine.sleep_s = TOO_LONG_S
        await served.call()
        await served.call()
        served.engine.sleep_s = 0
        await served.call()
        assert served.ran_on_loop() == [True, False, True]
        assert served.version.runs_on_loop


@pytest.mark.parametrize("fault", [None, EngineError("in vain")], ids=["succeeding", "failing"])
async def test_a_model_that_takes_long_leaves_the_loop_for_good(
    serving: Serving, caplog: pytest.LogCaptureFixture, fault: EngineError | None
) -> None:
    async with serving(identity(), place=ON_LOOP) as served:
        served.engine.cpu_ns = BOUND_NS * 2
        served.engine.fault = fault
        await served.call()
        await served.call()
        assert not served.version.runs_on_loop
        served.engine.cpu_ns = 0
        await served.call()
        assert served.ran_on_loop() == [True, False, False]
    assert "it runs on threads from now on" in caplog.text


async def test_instances_run_beside_each_other_and_no_further(serving: Serving) -> None:

    async with serving(identity(), "instance_group { count: 2 }") as served:
        served.engine.gate.clear()
        calls = served.submit_many(X, 3)
        await served.entered(2)
        assert (served.counters().running, served.counters().queued) == (2, 1)
        served.engine.gate.set()
        await asyncio.gather(*calls)
        names = set(served.engine.threads)
        assert names == {f"{served.version.spec.model}/1#{number}" for number in (0, 1)}


async def test_a_version_is_idle_as_soon_as_the_last_answer_is_out(serving: Serving) -> None:
    """Whoever got it may ask for the model's room at once, before the loop does."""
    async with serving(identity()) as served:
        idle: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def answer(_call: Call, _ending: Ending) -> None:
            idle.get_loop().call_soon_threadsafe(idle.set_result, served.version.is_idle)

        member = served.session.member(served.version.spec, X)
        now_ns = time.monotonic_ns()
        call = Call(member, served.version, lambda _call, _ending: None, now_ns, answer)
        served.engine.gate.clear()
        served.version.submit(call, flow=0, priority=0, timeout_us=0, now_ns=now_ns)
        await served.entered()
        assert not served.version.is_idle
        served.engine.gate.set()
        assert await idle


# Time

DELAY_NS = 100_000_000
DELAYED = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 100000 }"
PATIENT = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 60000000 }"


async def test_a_delay_gathers_company_and_then_ends(serving: Serving) -> None:
    async with serving(add(1), DELAYED) as served:
        endings = [await ended for ended in served.submit_many(ROW, 3)]
        assert [ending.batch_rows for ending in endings] == [3, 3, 3]
        alone = await served.call(ROW)
        assert alone.batch_rows == 1
        assert alone.queue_ns >= DELAY_NS


async def test_a_full_batch_does_not_wait_for_the_delay(serving: Serving) -> None:
    async with serving(add(1), PATIENT) as served:
        endings = [await ended for ended in served.submit_many(ROW, 8)]
        assert {ending.batch_rows for ending in endings} == {8}


async def test_a_deadline_ends_a_request_that_waits_but_not_one_that_runs(serving: Serving) -> None:

    async with serving(identity()) as served:
        served.engine.gate.clear()
        _, running = served.submit(timeout_us=1_000_000)
        await served.entered()
        waiting = await served.call(timeout_us=1000)
        assert error_of(waiting, TimedOut) == "Request timeout expired"
        assert served.engine.threads == [f"{served.version.spec.model}/1#0"]
        served.engine.gate.set()
        assert (await running).outcome.error is None


# Ends


async def test_a_cancelled_run_ends_at_once_and_its_slot_comes_back(serving: Serving) -> None:

    async with serving(identity("FP32", (WIDE,))) as served:
        served.engine.gate.clear()
        call, ended = served.submit({"x": np.zeros(WIDE, np.float32)})
        waiting, waiting_ended = served.submit({"x": np.zeros(WIDE, np.float32)})
        await served.entered()
        assert served.session.output.leased_bytes == 4 * WIDE
        for each in (call, waiting, call):
            each.cancel()
        error_of(ended.result(), Cancelled)
        error_of(waiting_ended.result(), Cancelled)
        served.engine.gate.set()
    assert served.session.output.stale_releases == 0
    assert len(served.engine.threads) == 1, "what was cancelled before its run never runs"


async def test_a_cancelled_member_takes_nothing_from_its_batch_mates(serving: Serving) -> None:

    async with serving(add(1), "max_batch_size: 4 dynamic_batching {}") as served:
        served.engine.gate.clear()
        _, first = served.submit(ROW)
        await served.entered()
        mates = [served.submit({"a": ROW["a"] * number})[1] for number in range(2)]
        leaving, left = served.submit(ROW)
        served.engine.let_go()
        await first
        await served.entered()  # the three of them
        leaving.cancel()
        error_of(left.result(), Cancelled)
        served.engine.gate.set()
        for number, mate in enumerate(mates):
            ending = await mate
            assert ending.batch_rows == 3
            assert served.session.arrays(ending.outcome)["c"][0, 0] == number + 1


async def test_a_priority_that_does_not_exist_is_the_callers_fault(serving: Serving) -> None:
    config = "dynamic_batching { priority_levels: 2 default_priority_level: 1 }"
    async with serving(identity(), config) as served:
        ending = await served.call(priority=3)
        assert "the request's priority is 3" in error_of(ending, InvalidArgument)
        assert (await served.call(priority=2)).outcome.error is None


async def test_retiring_finishes_what_is_there_and_refuses_the_rest(serving: Serving) -> None:

    async with serving(identity()) as served:
        served.engine.gate.clear()
        calls = served.submit_many(X, 3)
        await served.entered()
        retiring = asyncio.create_task(served.version.retire("gone for good", WAIT_S_MAX))
        await asyncio.sleep(0)
        assert error_of(await served.call(), Unavailable) == "gone for good"
        assert not served.engine.closed.is_set()
        served.engine.gate.set()
        for ending in await asyncio.gather(*calls):
            assert ending.outcome.error is None
        await retiring
        assert served.engine.closed.is_set()
        assert error_of(await served.call(), Unavailable) == "gone for good"


async def test_retiring_does_not_wait_for_a_run_without_end(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(identity("FP32", (WIDE,))) as served:
        served.engine.gate.clear()
        calls = [served.submit({"x": np.zeros(WIDE, np.float32)})[1] for _ in range(2)]
        await served.entered()
        await served.version.retire("gone for good", 0.01)
        for call in calls:
            assert error_of(call.result(), Unavailable) == "gone for good"
        assert not served.engine.closed.is_set(), "the run is still using it"
        served.engine.gate.set()
        assert await asyncio.to_thread(served.engine.closed.wait, WAIT_S_MAX)
        await asyncio.sleep(0)  # the run's end is told to the loop
    assert "was still busy after 0.01 s" in caplog.text


# Counters


async def test_counters_say_how_everything_ended(serving: Serving) -> None:
    config = "dynamic_batching { default_queue_policy { max_queue_size: 2 } }"
    async with serving(identity(), config) as served:
        await served.call()
        served.engine.fault = EngineError("in vain")
        error_of(await served.call(), Internal)
        served.engine.fault = None
        served.engine.gate.clear()
        _, running = served.submit()
        await served.entered(3)
        leaving, _ = served.submit()
        _, staying = served.submit()
        assert error_of(await served.call(), QueueFull) == "Exceeds maximum queue size"
        leaving.cancel()
        error_of(await served.call(timeout_us=1000), TimedOut)
        served.engine.gate.set()
        await asyncio.gather(running, staying)
        counters = served.counters()
        ends = {
            field.name: value
            for field, value in counters.ListFields()
            if field.name.startswith("requests_")
        }
        assert ends == {
            "requests_ok": 3,
            "requests_failed": 1,
            "requests_refused": 1,
            "requests_timed_out": 1,
            "requests_cancelled": 1,
        }
        assert (counters.rows, counters.batches) == (3, 3)
        assert [(size.rows, size.batches) for size in counters.batch_sizes] == [(1, 3)]
        assert counters.compute_ns > 0
        assert counters.total_ns >= counters.queue_ns + counters.compute_ns
        assert counters.failed_ns > 0
        assert (counters.queued, counters.running) == (0, 0)


async def test_batches_are_counted_by_their_size(serving: Serving) -> None:

    async with serving(add(1), DELAYED) as served:
        for callers in (3, 1, 3):
            await asyncio.gather(*served.submit_many(ROW, callers))
        counters = served.counters()
        assert [(size.rows, size.batches) for size in counters.batch_sizes] == [(1, 1), (3, 2)]
        assert (counters.rows, counters.batches, counters.requests_ok) == (7, 3, 7)


async def test_counters_go_on_where_those_of_the_version_before_stood(serving: Serving) -> None:

    async with serving(identity()) as old:
        await old.call()
        async with serving(identity()) as new:
            new.version.statistics.continue_from(old.version.statistics)
            await new.call()
            old.engine.gate.clear()
            _, last = old.submit()
            old.engine.gate.set()
            await last
            assert new.counters().requests_ok == 3
