# SPDX-License-Identifier: Apache-2.0
"""What a model version counts."""

import asyncio

from support.models import add, identity
from support.served import DELAYED, ROW, Serving, error_of
from thirdrail.errors import Internal, QueueFull, TimedOut
from thirdrail_engines import EngineError


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
