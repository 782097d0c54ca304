# SPDX-License-Identifier: Apache-2.0
"""A lane's session with a real worker: memory, model ids, cancels, limits."""

import asyncio

import numpy as np
import pytest

from support.killable import until
from support.worker import RunningWorker
from thirdrail.errors import ResourceExhausted, Unavailable
from thirdrail.lane.aio import AsyncLane, Reply
from thirdrail.tensors import Array, bytes_of_array, tensor_of_array
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2

LARGE = np.arange(1 << 20, dtype=np.float32)  # 4 MiB: never inline


def identity_request(array: Array, **fields: object) -> tuple[pb.InferRequest, list[memoryview]]:
    """A request whose data travel beside it."""
    request = pb.InferRequest(model_name="identity_fp32", **fields)  # type: ignore[arg-type]
    request.inputs.add(name="x", data_type=tensor_pb2.DATA_TYPE_FP32, shape=array.shape)
    return request, [memoryview(bytes_of_array(array))]


def slow_request(turns: int, name: str = "slow") -> pb.InferRequest:
    inputs = [
        tensor_of_array("x", np.zeros(1, np.float32)),
        tensor_of_array("turns", np.array(turns, np.int64)),
    ]
    return pb.InferRequest(model_name=name, inputs=inputs)


def read(reply: Reply, index: int = 0) -> Array:
    data = reply.data[index]
    assert data is not None
    return np.frombuffer(data, np.float32)


def test_large_tensors_travel_in_memory_and_come_back_unchanged(worker: RunningWorker) -> None:
    lane = worker.attach()
    for number in range(5):
        reply = worker.infer(lane, *identity_request(LARGE))
        assert reply.response.outputs[0].HasField("ref")
        assert np.array_equal(read(reply), LARGE)
        # Out of the engine: the shape is open, and known from the first result on.
        assert reply.response.timing.copies == (number == 0)
        reply.release()
    assert worker.status().arena_bytes <= 16 << 20, "memory is used again, not added"


def test_small_tensors_travel_inline(worker: RunningWorker) -> None:
    lane = worker.attach()
    reply = worker.infer(lane, *identity_request(LARGE[:16]))
    assert reply.response.outputs[0].HasField("raw")
    assert np.array_equal(read(reply), LARGE[:16])


def test_results_that_are_not_released_use_up_the_sessions_memory_alone(
    worker: RunningWorker,
) -> None:
    greedy, other = worker.attach(), worker.attach()
    held = []
    for _ in range(32):
        reply = worker.infer(greedy, *identity_request(LARGE))
        if reply.response.status.reason:
            break
        held.append(reply)
    assert reply.response.status.reason == pb.REASON_RESOURCE_EXHAUSTED
    assert "were not released yet" in reply.response.status.message
    assert np.array_equal(read(worker.infer(other, *identity_request(LARGE))), LARGE)
    held.pop().release()
    assert not worker.infer(greedy, *identity_request(LARGE)).response.status.reason


def test_a_tensor_larger_than_the_arena_is_refused_before_anything_is_sent(
    worker: RunningWorker,
) -> None:
    lane = worker.attach()
    huge = np.zeros(17 << 20, np.float32)
    with pytest.raises(ResourceExhausted, match="does not fit the input arena"):
        worker.infer(lane, *identity_request(huge))


def test_more_tensors_than_the_arena_holds_wait_for_their_turn(worker: RunningWorker) -> None:
    lane = worker.attach()

    async def many() -> list[Reply]:
        replies = []

        async def one() -> None:
            reply = await lane.call(*identity_request(LARGE))
            assert not reply.response.status.reason, reply.response.status
            replies.append(reply)
            reply.release()

        await asyncio.gather(*(one() for _ in range(30)))
        return replies

    assert len(worker.run(many())) == 30


def test_a_model_id_is_bound_by_a_request_with_both(worker: RunningWorker) -> None:
    lane = worker.attach()
    unbound = pb.InferRequest(model_id=7)
    assert worker.infer(lane, unbound).response.status.reason == pb.REASON_NOT_FOUND
    request, data = identity_request(LARGE[:4], model_id=7)
    assert not worker.infer(lane, request, data).response.status.reason
    by_id, data = identity_request(LARGE[:4])
    by_id.ClearField("model_name")
    by_id.model_id = 7
    assert np.array_equal(read(worker.infer(lane, by_id, data)), LARGE[:4])


def test_a_model_id_of_another_session_means_nothing(worker: RunningWorker) -> None:
    first, second = worker.attach(), worker.attach()
    request, data = identity_request(LARGE[:4], model_id=7)
    worker.infer(first, request, data)
    answer = worker.infer(second, pb.InferRequest(model_id=7)).response
    assert answer.status.reason == pb.REASON_NOT_FOUND


def test_a_cancelled_call_leaves_nothing_behind(worker: RunningWorker) -> None:
    lane = worker.attach()

    async def cancel_while_running() -> None:
        call = asyncio.create_task(lane.call(slow_request(100_000)))
        await asyncio.sleep(0)  # it is sent, and no answer is read before it is cancelled
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    worker.run(cancel_while_running())
    until(lambda: lane.calls_in_flight == 0)
    assert worker.counters()["slow"].requests_cancelled >= 1


def test_a_request_whose_time_has_passed_is_never_run(worker: RunningWorker) -> None:
    lane = worker.attach()

    async def two() -> tuple[Reply, Reply]:
        first = asyncio.create_task(lane.call(slow_request(100_000, "narrow")))
        await asyncio.sleep(0)  # it is sent first, and runs longer than the second may wait
        late = slow_request(1, "narrow")
        late.timeout_us = 1000
        second = await lane.call(late)
        return await first, second

    before = worker.counters()["narrow"].batches
    first, second = worker.run(two())
    assert not first.response.status.reason
    assert second.response.status.reason == pb.REASON_TIMED_OUT
    assert worker.counters()["narrow"].batches == before + 1


def test_calls_fail_as_unavailable_when_the_lane_ends(worker: RunningWorker) -> None:
    lane = worker.attach()

    async def close_while_running() -> None:
        call = asyncio.create_task(lane.call(slow_request(100_000)))
        await asyncio.sleep(0)  # it is sent, and no answer is read before the end
        lane.close("closed by the test")
        with pytest.raises(Unavailable, match="closed by the test"):
            await call
        with pytest.raises(Unavailable, match="closed by the test"):
            await lane.call(slow_request(1))

    worker.run(close_while_running())


def test_more_calls_than_allowed_are_refused_at_once(worker: RunningWorker) -> None:
    lane = worker.attach()

    async def flood() -> list[Reply | BaseException]:
        calls = [lane.call(slow_request(1000)) for _ in range(40)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = worker.run(flood())
    refused = [a for a in answers if isinstance(a, ResourceExhausted)]
    assert len(refused) == 8
    assert len(answers) - len(refused) == 32


def test_a_call_that_is_cancelled_as_its_answer_comes_keeps_no_output_memory(
    worker: RunningWorker,
) -> None:
    lane = worker.attach()

    async def answered_and_cancelled() -> None:
        take = lane._on_response
        call = asyncio.create_task(lane.call(*identity_request(LARGE)))

        def take_and_cancel(response: pb.InferResponse) -> None:
            take(response)
            call.cancel()

        lane._on_response = take_and_cancel  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await call

    leases = worker.status().leases
    worker.run(answered_and_cancelled())
    until(lambda: worker.status().leases == leases)


def test_closed_sessions_give_their_memory_and_descriptors_back(worker: RunningWorker) -> None:
    lanes: list[AsyncLane] = [worker.attach() for _ in range(10)]
    for lane in lanes:
        worker.infer(lane, *identity_request(LARGE))
    during = worker.status()
    fds = worker.fd_count()
    for lane in lanes:
        worker.loop.call_soon_threadsafe(lane.close)
    until(lambda: worker.status().sessions <= during.sessions - 10)
    after = worker.status()
    assert after.sessions == during.sessions - 10
    assert after.arena_bytes <= during.arena_bytes - 10 * (8 << 20)
    until(lambda: worker.fd_count() <= fds - 10)
