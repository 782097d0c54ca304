# SPDX-License-Identifier: Apache-2.0
"""How the calls of a model version end, and what an end leaves behind."""

import asyncio

import numpy as np
import pytest

from support.models import add, identity
from support.served import ROW, WAIT_S_MAX, WIDE, Serving, X, error_of
from thirdrail.errors import Cancelled, InvalidArgument, Unavailable


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
