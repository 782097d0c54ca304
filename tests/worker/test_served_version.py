# SPDX-License-Identifier: Apache-2.0
"""A model version at work: where its runs happen, and when."""

import asyncio
import time

import numpy as np
import pytest

from support.models import add, identity
from support.served import (
    BOUND_NS,
    DELAY_NS,
    DELAYED,
    ON_LOOP,
    ROW,
    TOO_LONG_S,
    Serving,
    X,
    error_of,
)
from thirdrail.errors import TimedOut
from thirdrail_engines import EngineError
from thirdrail_server.worker.calls import Call, Ending
from thirdrail_server.worker.run_place import (
    INLINE_INPUT_BYTES_MAX,
    ROUND_RUNS,
    LargeRuns,
    RunPlace,
)

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
    place = RunPlace(on_loop=True, overrun_ns_max=BOUND_NS, run_ns_max=bound_s * 10**9)
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


async def test_a_model_comes_to_the_loop_when_its_runs_on_threads_were_short(
    serving: Serving,
) -> None:
    place = RunPlace(on_loop=False, learns=True, run_ns_max=BOUND_NS, overrun_ns_max=BOUND_NS)
    async with serving(identity(), place=place) as served:
        served.engine.sleep_s = TOO_LONG_S
        for _ in range(2):
            await served.call()
        served.engine.sleep_s = 0
        for _ in range(ROUND_RUNS - 2):
            await served.call()
        assert served.version.runs_on_loop
        await served.call()
        assert served.ran_on_loop() == [*([False] * ROUND_RUNS), True]


async def test_runs_that_fail_say_nothing_of_how_long_others_take(serving: Serving) -> None:
    place = RunPlace(on_loop=False, learns=True, run_ns_max=BOUND_NS, overrun_ns_max=BOUND_NS)
    async with serving(identity(), place=place) as served:
        served.engine.fault = EngineError("in vain")
        for _ in range(2 * ROUND_RUNS):
            await served.call()
        assert not served.version.runs_on_loop


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
