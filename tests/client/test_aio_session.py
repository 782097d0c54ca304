# SPDX-License-Identifier: Apache-2.0
"""A session on an event loop with a real worker that has small limits: waits, cancels, memory."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.worker import RunningWorker, running_worker
from thirdrail import errors
from thirdrail.lane.aio_session import AsyncSession
from thirdrail.lane.calls import NotSent
from thirdrail.lane.encoding import Encoder
from thirdrail.lane.results import private_result
from thirdrail.requests import Result
from thirdrail.tensors import Array
from thirdrail_server.config import LaneLimits, WorkerConfig

MIB = 1 << 20
LANES = 24
LIMITS = LaneLimits(
    calls_in_flight_max=32, input_arena_bytes_max=32 * MIB, output_arena_bytes_max=64 * MIB
)
LARGE = np.arange(MIB, dtype=np.float32)  # 4 MiB: never inline, and copied beside the loop
MIDDLE = LARGE[: 64 << 10]  # never inline, and copied on the loop

encoder = Encoder()


@pytest.fixture(scope="module")
def worker(standard_repository: Path) -> Iterator[RunningWorker]:
    with running_worker(WorkerConfig(lane=LIMITS), lanes=LANES) as running:
        running.load(standard_repository)
        yield running


Body = Callable[[AsyncSession], Awaitable[None]]


async def opened(worker: RunningWorker, *, is_debug: bool = False) -> AsyncSession:
    return await AsyncSession.open(worker.sockets.pop(), b"", "test", is_debug=is_debug)


def with_session(body: Body) -> Callable[[RunningWorker], None]:
    """A test with a session of its own, which must end with all memory given back."""

    def test(worker: RunningWorker) -> None:
        async def run() -> None:
            session = await opened(worker)
            try:
                await body(session)
                if not session.is_closed:
                    await until(lambda: session.memory_held == (0, 0))
            finally:
                session.leave()

        asyncio.run(run())

    return test


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def infer(
    session: AsyncSession, model: str, arrays: Mapping[str, Array], *, borrow: bool = False
) -> Result:
    return await session.infer(encoder.options(model, None, {}), arrays, encoder, borrow=borrow)


async def echoed(session: AsyncSession, array: Array) -> Array:
    return (await infer(session, "identity_fp32", {"x": array}))["y"]


def slow(turns: int) -> dict[str, Array]:
    return {"x": np.ones(1, np.float32), "turns": np.array(turns)}


@with_session
async def test_more_calls_than_the_session_may_have(session: AsyncSession) -> None:
    numbers = [np.full(4, n, np.float32) for n in range(2000)]
    found = await asyncio.gather(*(echoed(session, number) for number in numbers))
    assert all((a == b).all() for a, b in zip(found, numbers, strict=True))


@with_session
async def test_more_tensors_than_the_arenas_hold(session: AsyncSession) -> None:
    """64 calls of 4 MiB through 32 MiB: each waits until there is room for it."""
    tensors = [LARGE + n for n in range(64)]
    found = await asyncio.gather(*(echoed(session, tensor) for tensor in tensors))
    assert all((a == b).all() for a, b in zip(found, tensors, strict=True))


@pytest.mark.slow
@with_session
async def test_results_come_no_faster_than_they_are_copied(session: AsyncSession) -> None:
    """Whoever copies them may be slow. The output arena has room for 16."""
    numbers = itertools.count()

    def copy_slowly(*arguments: Any) -> Result:
        time.sleep(0.5 if next(numbers) % 4 else 0)
        return private_result(*arguments)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(64) as many:
        patch.setattr("thirdrail.lane.aio_session.private_result", copy_slowly)
        asyncio.get_running_loop().set_default_executor(many)
        await asyncio.gather(*(echoed(session, LARGE) for _ in range(48)))


@with_session
async def test_what_can_never_fit(session: AsyncSession) -> None:
    with pytest.raises(errors.ResourceExhausted, match="do not fit the input arena"):
        await echoed(session, np.zeros(9 * MIB, np.float32))
    with pytest.raises(errors.ResourceExhausted, match="without its tensors"):
        await session.infer(bytes(100_000), {}, encoder, borrow=False)
    held = [await session.empty(MIB, np.float32, alone=False) for _ in range(7)]
    with pytest.raises(errors.ResourceExhausted, match=r"arrays of client\.empty\(\) hold"):
        await echoed(session, np.zeros(3 * MIB, np.float32))
    held.clear()
    assert (await echoed(session, LARGE) == LARGE).all()  # and the session goes on


@with_session
async def test_what_keeps_the_memory_is_named(session: AsyncSession) -> None:
    held: list[Any] = []

    async def borrow_for_ever() -> None:
        while True:
            held.append(await infer(session, "identity_fp32", {"x": LARGE}, borrow=True))

    with pytest.raises(errors.ResourceExhausted) as told:
        await borrow_for_ever()
    kept = len(held) * LARGE.nbytes
    assert [note.split(":")[0] for note in told.value.__notes__] == [
        f"borrowed results keep {kept} bytes of the lane's memory"
    ]
    held.clear()


@with_session
async def test_arrays_of_empty_are_sent_where_they_are(session: AsyncSession) -> None:
    array = await session.empty((2, 64, 1024), np.float32, alone=False)
    array[:] = np.arange(array.size).reshape(array.shape)
    before = session.memory_held[0]
    for part in (array.reshape(-1), array[1].reshape(-1), array.reshape(-1)[16:]):
        call = asyncio.ensure_future(echoed(session, part))
        await asyncio.sleep(0)
        assert session.calls_in_flight
        assert session.memory_held[0] == before, "it was copied"
        assert (await call == part).all()
    assert (await echoed(session, array.reshape(-1)[::2]) == array.reshape(-1)[::2]).all()
    assert (await echoed(session, array.reshape(-1)[1:]) == array.reshape(-1)[1:]).all()


@with_session
async def test_small_odd_and_shared_ones(session: AsyncSession) -> None:
    assert (await session.empty(3, np.float32, alone=False)).shape == (3,)
    assert (await session.empty((0, 4), np.float32, alone=True)).shape == (0, 4)
    assert (await session.empty((), object, alone=False)).dtype == object
    alone = await session.empty(MIDDLE.shape, np.float32, alone=True)
    alone[:] = MIDDLE
    assert (await echoed(session, alone) == MIDDLE).all()


@with_session
async def test_borrowed_results(session: AsyncSession) -> None:
    result = await infer(session, "identity_fp32", {"x": LARGE}, borrow=True)
    assert result.is_borrowed
    assert session.memory_held[1] == 1
    assert not result["y"].flags.writeable
    onwards = await infer(session, "identity_fp32", {"x": result["y"]}, borrow=True)
    assert onwards["y"].ctypes.data != result["y"].ctypes.data
    assert (onwards["y"] == LARGE).all()
    result.release()
    assert session.memory_held[1] == 1
    view = onwards["y"][10:20]
    del onwards
    await asyncio.sleep(0.3)
    assert session.memory_held[1] == 1, "a view of it is still there"
    del view
    await until(lambda: session.memory_held[1] == 0)  # nobody sent anything meanwhile


@with_session
async def test_a_result_is_released_in_another_thread(session: AsyncSession) -> None:
    asyncio.get_running_loop().set_debug(True)  # complains of calls from other threads
    result = await infer(session, "identity_fp32", {"x": LARGE}, borrow=True)
    await asyncio.to_thread(result.release)
    await until(lambda: session.memory_held[1] == 0)


@with_session
async def test_cancelled_calls_leave_nothing_behind(session: AsyncSession) -> None:
    running = asyncio.ensure_future(infer(session, "slow", slow(60_000)))
    tasks = [
        asyncio.ensure_future(infer(session, "slow", slow(1) | {"x": MIDDLE})) for _ in range(20)
    ]
    large = [asyncio.ensure_future(echoed(session, LARGE)) for _ in range(20)]
    await until(lambda: session.calls_in_flight > 20)
    for number, task in enumerate((*tasks, *large)):
        task.cancel()
        if number % 3 == 0:
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, *large, return_exceptions=True)
    assert any(isinstance(each, asyncio.CancelledError) for each in outcomes)
    assert (await running)["y"].tolist() == [1.0]
    await until(lambda: session.calls_in_flight == 0)
    assert (await echoed(session, LARGE) == LARGE).all()


@with_session
async def test_results_that_come_after_a_cancel_go_back(session: AsyncSession) -> None:
    """More of them than the session's output arena holds."""
    for _ in range(2 * LIMITS.output_arena_bytes_max // MIDDLE.nbytes):
        task = asyncio.ensure_future(echoed(session, MIDDLE))
        await asyncio.sleep(0)
        time.sleep(0.003)  # the answer is there, and not read yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await echoed(session, MIDDLE) == MIDDLE).all()


@with_session
async def test_a_tensor_that_comes_as_its_receiver_is_cancelled_goes_back(
    session: AsyncSession,
) -> None:
    exports = session.exports
    token = (await exports.export(LARGE, None, 60.0)).token
    take, receiving = exports.on_answer, [asyncio.ensure_future(exports.receive(token))]

    def take_and_cancel(*arguments: Any) -> list[int]:
        left = take(*arguments)
        receiving[0].cancel()
        return left

    setattr(exports, "on_answer", take_and_cancel)  # noqa: B010 mypy wants no methods assigned
    with pytest.raises(asyncio.CancelledError):
        await receiving[0]
    setattr(exports, "on_answer", take)  # noqa: B010
    receiving.clear()
    await until(lambda: not len(session._memory.shown))


@with_session
async def test_a_cancel_while_memory_is_awaited(session: AsyncSession) -> None:
    for alone in (True, False):
        task = asyncio.ensure_future(session.empty(MIB, np.float32, alone=alone))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    found = await session.empty(MIB, np.float32, alone=True)
    assert found.nbytes == 4 * MIB


@with_session
async def test_failures_and_what_follows(session: AsyncSession) -> None:
    with pytest.raises(errors.NotFound):
        await infer(session, "nowhere", {"x": LARGE})
    with pytest.raises(errors.InvalidArgument, match="idx=9 must be within"):
        await infer(session, "gather", {"index": np.array([9])})
    with pytest.raises(errors.InvalidArgument, match="'x'"):
        await infer(session, "identity_fp32", {"x": LARGE.astype(np.float64)}, borrow=True)
    assert (await echoed(session, LARGE.astype(">f4")) == LARGE).all()


def test_debug_mode(worker: RunningWorker) -> None:
    async def run() -> None:
        session = await opened(worker, is_debug=True)
        array = await session.empty(LARGE.shape, np.float32, alone=False)
        array[:] = LARGE
        assert (await echoed(session, array) == LARGE).all()
        task = asyncio.ensure_future(infer(session, "slow", slow(300) | {"x": array}))
        await asyncio.sleep(0)
        array[-1] = 0
        with pytest.raises(errors.FailedPrecondition, match="'x' was written while"):
            await task
        address: Any = array.ctypes.data
        del array, task  # whose traceback has it, too
        await until(lambda: session.memory_held[0] == 0)
        again = await session.empty(LARGE.shape, np.float32, alone=False)
        assert again.ctypes.data == address
        assert set(again.view(np.uint8)[:100].tolist()) == {0xDB}
        session.leave()

    asyncio.run(run())


def test_the_end_of_a_session(worker: RunningWorker) -> None:
    async def run() -> None:
        session = await opened(worker)
        running = asyncio.ensure_future(infer(session, "slow", slow(60_000)))
        behind_it = slow(1) | {"x": LARGE}
        waiting = [asyncio.ensure_future(infer(session, "slow", behind_it)) for _ in range(100)]
        await until(lambda: session.calls_in_flight)
        session.leave()
        with pytest.raises(errors.Cancelled, match="the client was closed"):
            await running
        await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(task.exception()) for task in waiting} == {errors.Cancelled}

        session = await opened(worker)
        running = asyncio.ensure_future(infer(session, "slow", slow(20_000)))
        await until(lambda: session.calls_in_flight)
        session.close("the worker is gone")
        with pytest.raises(errors.Unavailable, match="the worker is gone") as raised:
            await running
        assert not isinstance(raised.value, NotSent)
        for attempt in (echoed(session, LARGE), session.empty(MIB, np.float32, alone=True)):
            with pytest.raises(NotSent, match="the worker is gone"):
                await attempt

    asyncio.run(run())
