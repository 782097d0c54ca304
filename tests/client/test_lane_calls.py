# SPDX-License-Identifier: Apache-2.0
"""The blocking client's lane to a real worker: many threads, values of every kind, deaths."""

import concurrent.futures
import gc
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.lanes import Caller, calling
from support.worker import RunningWorker, running_worker
from thirdrail import errors
from thirdrail.dtypes import BYTES, DTYPES, DType

LANES = 64
LARGE = 1 << 14  # elements of FP32: by reference
# A second or so: an engine's run is not cut short by a cancel.
LONG = {"x": np.ones(1, np.float32), "turns": np.array(100_000)}
FOR_EVER = LONG | {"turns": np.array(2_000_000_000)}


@pytest.fixture(scope="module")
def worker(standard_repository: Path) -> Iterator[RunningWorker]:
    with running_worker(lanes=LANES) as running:
        running.load(standard_repository)
        yield running


@pytest.fixture
def caller(worker: RunningWorker) -> Iterator[Caller]:
    with calling(worker) as caller:
        yield caller


def of(number: int, size: int) -> dict[str, Any]:
    return {"x": np.full(size, number, np.float32)}


def test_many_threads_get_their_own_answers(caller: Caller) -> None:
    """Large and small ones, more of them than any arena would hold at once."""

    def call(thread: int) -> bool:
        numbers = range(thread * 1000, thread * 1000 + 200)
        sizes = (4, LARGE, 7, 1 << 18)
        for number in numbers:
            result = caller.infer("identity_fp32", of(number, sizes[number % len(sizes)]))
            if not (result["y"] == number).all():
                return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(16)))


@pytest.mark.slow
def test_many_futures_of_large_results(caller: Caller) -> None:
    """More bytes than the output arena has: what nobody asked for yet is taken in as it comes."""
    futures = [caller.submit("identity_fp32", of(number, 1 << 18)) for number in range(1500)]
    for number, future in enumerate(futures):
        assert future.result()["y"][-1] == number


def test_results_may_be_kept(caller: Caller) -> None:
    kept = [caller.infer("identity_fp32", of(number, 1 << 18)) for number in range(1100)]
    assert [int(result["y"][0]) for result in kept] == list(range(1100))
    assert not any(result["y"].flags.writeable for result in kept)


def test_an_answer_may_overtake(caller: Caller) -> None:
    slow = caller.submit("slow", LONG)
    assert caller.infer("identity_fp32", of(1, 4))["y"][0] == 1
    assert not slow.done()
    slow.cancel()


def test_a_failed_request_is_its_own(caller: Caller) -> None:
    with pytest.raises(errors.NotFound):
        caller.infer("nobody", of(1, 4))
    with pytest.raises(errors.InvalidArgument, match="data-type"):
        caller.infer("identity_fp32", {"x": np.zeros(4)})
    with pytest.raises(errors.InvalidArgument, match="complex64"):
        caller.infer("identity_fp32", {"x": np.zeros(4, np.complex64)})
    assert caller.infer("identity_fp32", of(1, 4))["y"][0] == 1


def test_a_timeout_ends_the_wait_and_the_request(caller: Caller, worker: RunningWorker) -> None:
    with pytest.raises(errors.TimedOut):
        caller.infer("slow", LONG, timeout=0.05)
    deadline = time.monotonic() + 30
    while worker.counters()["slow"].running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert caller.infer("identity_fp32", of(1, 4), timeout=30)["y"][0] == 1


def test_a_cancelled_request_leaves_the_worker(caller: Caller, worker: RunningWorker) -> None:
    before = worker.counters()["slow"].requests_cancelled
    future = caller.submit("slow", LONG)
    assert future.cancel()
    deadline = time.monotonic() + 30
    while worker.counters()["slow"].requests_cancelled == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Values


def example(dtype: DType, count: int) -> np.ndarray[Any, Any]:
    if dtype is BYTES:
        return np.array([b"", b"a\0b", "ä".encode() * 1000] * count, dtype=np.object_)
    assert dtype.numpy is not None
    return np.array([0, 1, 1] * count, dtype=dtype.numpy)


@pytest.mark.parametrize("count", [1, 20_000], ids=["inline", "by reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda row: row.name)
def test_every_type_there_and_back(caller: Caller, dtype: DType, count: int) -> None:
    sent, model = example(dtype, count if dtype is not BYTES else min(count, 100)), dtype.name
    for array in (sent, sent[::-1], sent[::2], sent[:0]):
        for borrow in (False, True):
            result = caller.infer(f"identity_{model.lower()}", {"x": array}, borrow=borrow)
            np.testing.assert_array_equal(result["y"], array, strict=True)
            assert not result["y"].flags.writeable


@pytest.mark.parametrize("count", [3, LARGE], ids=["inline", "by reference"])
def test_whatever_lies_in_memory_otherwise_arrives(caller: Caller, count: int) -> None:
    plain = np.arange(count, dtype=np.float32)
    for array in (plain.astype(">f4"), np.asfortranarray(plain), np.repeat(plain, 2)[::2]):
        result = caller.infer("identity_fp32", {"x": array})
        np.testing.assert_array_equal(result["y"], plain, strict=True)


def test_text_is_bytes(caller: Caller) -> None:
    result = caller.infer("identity_bytes", {"x": np.array(["a", "ü"])})
    assert result["y"].tolist() == [b"a", "ü".encode()]


def test_options_reach_the_worker(caller: Caller) -> None:
    for request_id in ("one", "two", ""):
        result = caller.infer("identity_fp32", of(1, 4), request_id=request_id, outputs=["y"])
        assert result.request_id == request_id
    assert result.timing.transport == "lane"
    assert (result.model_name, result.model_version) == ("identity_fp32", 1)
    result = caller.infer(
        "classifier", {"x": np.eye(3, dtype=np.float32)[:1]}, outputs=["scores"], classes=1
    )
    assert result["scores"].tolist() == [[b"1.000000:0:cat"]]
    unsaid = caller.infer("identity_fp32", of(1, 4), outputs=None, parameters={}, classes=None)
    assert unsaid["y"][0] == 1
    with pytest.raises(errors.InvalidArgument, match="unexpected inference output"):
        caller.infer("identity_fp32", of(1, 4), outputs=["z"])
    with pytest.raises(TypeError, match="unknown"):
        caller.infer("identity_fp32", of(1, 4), unknown=1)  # type: ignore[call-arg]


def test_a_request_that_fits_no_packet_is_refused_here(caller: Caller) -> None:
    with pytest.raises(errors.ResourceExhausted, match="without its tensors has"):
        caller.infer("identity_fp32", of(1, 4), request_id="x" * (1 << 17))
    assert caller.infer("identity_fp32", of(1, 4))["y"][0] == 1


# Deaths


def test_everybody_wakes_when_the_worker_is_killed(standard_repository: Path) -> None:
    with running_worker() as running:
        running.load(standard_repository, "slow", "identity_fp32")
        with calling(running) as caller, ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(caller.infer, "slow", FOR_EVER) for _ in range(4)]
            futures = [caller.submit("slow", FOR_EVER) for _ in range(4)]
            concurrent.futures.wait(futures, 0.05)  # a watcher waits as well
            kept = caller.infer("identity_fp32", of(3, LARGE), borrow=True)
            running.process.send_signal(signal.SIGKILL)
            for each in (*waiting, *futures):
                assert isinstance(each.exception(30), errors.Unavailable)
            assert kept["y"][0] == 3, "what is mapped stays"
            kept.release()


def test_the_collector_may_run_inside_our_lock(caller: Caller) -> None:
    """It runs wherever memory is allocated; what it finds may release results, and end arrays."""

    class Knot:
        def __init__(self, result: Any, array: Any) -> None:
            self.me, self.result, self.array = self, result, array

        def __del__(self) -> None:
            self.result.release()

    gc.collect()
    gc.disable()
    try:
        for number in range(4):
            result = caller.infer("identity_fp32", of(number, LARGE), borrow=True)
            Knot(result, caller.lane.empty((LARGE,), np.float32, alone=False))
        del result
        assert caller.lane.talk.memory.input_bytes_used == 4 * 4 * LARGE
        with caller.lane.talk.lock:
            gc.collect()
    finally:
        gc.enable()
    assert caller.infer("identity_fp32", of(1, 4))["y"][0] == 1
    assert caller.lane.talk.memory.input_bytes_used == 0
