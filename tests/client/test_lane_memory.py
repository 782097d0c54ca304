# SPDX-License-Identifier: Apache-2.0
"""Shared memory in the hands of ordinary code: filled in place, borrowed, kept, let go, misused."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.lanes import Caller, calling
from support.worker import RunningWorker, running_worker
from thirdrail import errors
from thirdrail.lane.session_memory import SessionMemory
from thirdrail.tensors import Array
from thirdrail.v1 import lane_pb2
from thirdrail_server.config import LaneLimits, WorkerConfig

MIB = 1 << 20
LIMITS = LaneLimits(input_arena_bytes_max=16 * MIB, output_arena_bytes_max=16 * MIB)
SIZE = MIB // 4  # elements of FP32: 1 MiB
BIG = 12 * SIZE  # does not fit an arena twice


@pytest.fixture(scope="module")
def worker(standard_repository: Path) -> Iterator[RunningWorker]:
    with running_worker(WorkerConfig(lane=LIMITS), lanes=64) as running:
        running.load(standard_repository, "identity_fp32", "identity_bytes", "slow", "plus_one")
        yield running


@pytest.fixture
def caller(worker: RunningWorker) -> Iterator[Caller]:
    with calling(worker) as caller:
        yield caller


@pytest.fixture
def debugging(worker: RunningWorker) -> Iterator[Caller]:
    with calling(worker, is_debug=True) as caller:
        yield caller


def filled(caller: Caller, number: float, size: int = SIZE) -> Array:
    array = caller.lane.empty((size,), np.float32, alone=False)
    array[:] = number
    return array


def echoed(caller: Caller, array: Any, *, borrow: bool = True) -> Any:
    return caller.infer("identity_fp32", {"x": array}, borrow=borrow)


def used(caller: Caller) -> int:
    caller.lane.talk.memory.collect()
    return caller.lane.talk.memory.input_bytes_used


class Foreign:
    """A tensor of another library, which is known by DLPack alone."""

    def __init__(self, array: Array) -> None:
        self.__dlpack_device__ = array.__dlpack_device__
        self.__dlpack__ = array.__dlpack__


# Inputs


def test_an_array_filled_in_place_is_not_copied(caller: Caller) -> None:
    """There would be no room for a copy."""
    array = filled(caller, 3, BIG)
    assert (echoed(caller, array)["y"] == 3).all()
    with pytest.raises(errors.ResourceExhausted):
        echoed(caller, np.zeros(BIG, np.float32))


def test_views_count_as_what_they_show(caller: Caller) -> None:
    array = filled(caller, 0, BIG)
    array[:] = np.arange(BIG, dtype=np.float32)
    half = BIG // 2
    views: tuple[Any, ...] = (array[1024:], array.data, array[:half], array.reshape(2, -1)[1])
    for view in (*views, Foreign(array)):
        with echoed(caller, view) as result:
            shown = array if isinstance(view, Foreign) else np.asarray(view)
            np.testing.assert_array_equal(result["y"], shown.ravel())


def test_what_a_reference_cannot_name_is_copied(caller: Caller) -> None:
    array = filled(caller, 0, 4 * SIZE)
    array[:] = np.arange(array.size, dtype=np.float32)
    for view in (array[1:SIZE], array[::2], array[::-1]):  # not aligned, strided, backwards
        np.testing.assert_array_equal(echoed(caller, view)["y"], view)


def test_memory_comes_back_with_the_last_view(caller: Caller) -> None:
    array = filled(caller, 1)
    view = array.reshape(2, -1)[1]
    del array
    gc.collect()
    assert used(caller) > 0
    assert (view == 1).all()
    del view
    gc.collect()
    assert used(caller) == 0


def test_memory_stays_while_a_request_reads_it(caller: Caller) -> None:
    array = filled(caller, 1, SIZE)
    turns = np.array(20_000)
    future = caller.submit("slow", {"x": array, "turns": turns})
    del array
    gc.collect()
    assert used(caller) > 0
    assert (future.result()["y"] == 1).all()
    assert used(caller) == 0


def test_arrays_that_hold_everything_are_named(caller: Caller) -> None:
    held = [filled(caller, number) for number in range(15)]
    with pytest.raises(errors.ResourceExhausted, match=r"client\.empty\(\) hold 15"):
        caller.lane.empty((4 * SIZE,), np.float32, alone=False)
    with pytest.raises(errors.ResourceExhausted, match="hold 15"):
        echoed(caller, np.zeros(4 * SIZE, np.float32))
    held.clear()
    assert echoed(caller, np.zeros(SIZE, np.float32))["y"].shape == (SIZE,)


def test_what_can_never_fit_is_refused(caller: Caller) -> None:
    with pytest.raises(errors.ResourceExhausted, match="do not fit the input arena"):
        echoed(caller, np.zeros(5 * MIB, np.float32))


def test_what_fits_no_piece_is_refused(caller: Caller) -> None:
    """The arena's chunks stay as they are, so that this would wait for ever."""
    held = filled(caller, 1, SIZE), filled(caller, 1, 8 * SIZE)
    del held
    gc.collect()
    with pytest.raises(errors.ResourceExhausted, match="pieces"):
        echoed(caller, np.zeros(12 * SIZE, np.float32))


def test_requests_wait_for_each_others_room(caller: Caller) -> None:
    """Twice as many bytes as the arena has, all asked for before the first answer is there."""
    large, turns = np.ones(SIZE, np.float32), np.array(1000)
    futures = [caller.submit("slow", {"x": large * n, "turns": turns}) for n in range(32)]
    assert all((future.result()["y"] == n).all() for n, future in enumerate(futures))
    assert used(caller) == 0


def test_a_wait_for_room_ends_with_the_timeout(caller: Caller) -> None:
    long = {"x": np.ones(12 * SIZE, np.float32), "turns": np.array(100_000)}
    holding = caller.submit("slow", long)
    with pytest.raises(errors.TimedOut):
        caller.infer("identity_fp32", {"x": np.ones(12 * SIZE, np.float32)}, timeout=0.05)
    holding.cancel()


def test_a_request_gets_all_its_places_or_none() -> None:
    limits = lane_pb2.Limits(input_arena_bytes=2 * MIB)
    memory = SessionMemory(lane_pb2.Attached(limits=limits))
    chunk = lane_pb2.Chunk(role=lane_pb2.ARENA_ROLE_INPUT, size=MIB)
    memory.add_chunk(chunk, np.zeros(MIB, np.uint8))
    assert memory.reserve([600_000, 600_000]) is None
    assert memory.input_bytes_used == 0
    places = memory.reserve([500_000, 500_000])
    assert places is not None
    assert places[1].offset >= 500_000


def test_small_and_strange_arrays_are_ordinary(caller: Caller) -> None:
    cases: tuple[tuple[tuple[int, ...], Any], ...] = (
        ((3,), np.float32),
        ((0, 4), np.int8),
        ((1 << 20,), np.object_),
    )
    for shape, dtype in cases:
        array = caller.lane.empty(shape, dtype, alone=False)
        assert array.shape == shape
        assert array.dtype == dtype
    assert caller.lane.empty(5, np.float32, alone=False).shape == (5,)
    assert used(caller) == 0


# Results


def test_a_borrowed_result_is_a_view_until_it_is_released(caller: Caller) -> None:
    with echoed(caller, filled(caller, 2)) as result:
        assert result.is_borrowed
        assert (result["y"] == 2).all()
        assert not result["y"].flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            result["y"].flags.writeable = True
    for use in (lambda: result["y"], lambda: len(result), lambda: list(result)):
        with pytest.raises(errors.FailedPrecondition, match="was released"):
            use()
    result.release()
    assert repr(result).endswith("released>")


def test_a_view_outlives_its_result(caller: Caller) -> None:
    views = [echoed(caller, filled(caller, number))["y"][1:] for number in range(8)]
    gc.collect()
    echoed(caller, filled(caller, 99))
    assert [int(view[0]) for view in views] == list(range(8))


def test_collected_results_give_their_memory_back(caller: Caller) -> None:
    for number in range(64):  # four times what the arena holds
        assert echoed(caller, filled(caller, number))["y"][0] == number


def test_results_that_hold_everything_are_named_and_let_go(caller: Caller) -> None:
    array = filled(caller, 1)
    held: list[Any] = []

    def borrow_for_ever() -> None:
        while True:
            held.append(echoed(caller, array))

    with pytest.raises(errors.ResourceExhausted, match="were not released yet") as told:
        borrow_for_ever()
    assert len(held) >= 12
    kept = sum(each["y"].nbytes for each in held)
    assert told.value.__notes__ == [
        f"borrowed results keep {kept} bytes of the lane's memory: `with`, release(), or the end "
        "of all views gives them back",
        f"arrays of empty() keep {array.nbytes} bytes of the lane's memory: the end of all views "
        "gives it back",
    ]
    held[0].release()
    assert echoed(caller, array)["y"][0] == 1
    del held[:]
    assert echoed(caller, array)["y"][0] == 1


def test_small_results_and_text_are_never_borrowed(caller: Caller) -> None:
    small = echoed(caller, np.ones(4, np.float32))
    text = np.array([b"x" * 40_000], np.object_)
    large = caller.infer("identity_bytes", {"x": text}, borrow=True)
    assert not small.is_borrowed
    assert not large.is_borrowed
    assert large["y"].tolist() == text.tolist()


def test_a_future_may_borrow(caller: Caller) -> None:
    future = caller.submit("identity_fp32", {"x": filled(caller, 4)}, borrow=True)
    with future.result() as result:
        assert result.is_borrowed
        assert (result["y"] == 4).all()


def test_what_is_cancelled_is_given_back(caller: Caller) -> None:
    array = filled(caller, 1)
    for _ in range(100):
        caller.submit("identity_fp32", {"x": array}).cancel()
    assert echoed(caller, array)["y"][0] == 1


# From model to model


def test_a_result_is_the_next_input_without_a_copy(caller: Caller) -> None:
    result = echoed(caller, filled(caller, 1))
    before = used(caller)
    for step in range(2, 10):
        result = caller.infer(
            "plus_one", {"a": result["y" if step == 2 else "c"].reshape(-1, 4)}, borrow=True
        )
        assert (result["c"] == step).all()
        assert used(caller) <= before, "nothing went through the client"
    counted = caller.infer("identity_fp32", {"x": result["c"].reshape(-1)}, borrow=True)
    private = echoed(caller, np.full(SIZE, 9, np.float32))
    assert counted.timing.copies == private.timing.copies


def test_a_released_result_is_no_input_of_anybody(caller: Caller) -> None:
    """The view is still mapped, so that it is copied like any other array."""
    result = echoed(caller, filled(caller, 7))
    view = result["y"]
    result.release()
    assert echoed(caller, view)["y"].shape == view.shape


def test_memory_lives_as_long_as_any_view_of_it(worker: RunningWorker) -> None:
    with calling(worker) as caller:
        array, result = filled(caller, 5), echoed(caller, filled(caller, 6))
        view = result["y"]
        lane = weakref.ref(caller.lane)
    del caller, result
    gc.collect()
    assert lane() is None
    assert (array == 5).all()
    assert (view == 6).all()


# Debug mode


def test_an_input_written_in_flight_is_reported(debugging: Caller) -> None:
    array = filled(debugging, 1)
    future = debugging.submit("slow", {"x": array, "turns": np.array(20_000)})
    array[7] = 2
    with pytest.raises(errors.FailedPrecondition, match="input 'x' was written while"):
        future.result()
    assert debugging.infer("slow", {"x": array, "turns": np.array(1)})["y"][7] == 2


def test_released_memory_is_overwritten(debugging: Caller) -> None:
    result = echoed(debugging, filled(debugging, 1))
    view = result["y"].view(np.uint8)
    result.release()
    echoed(debugging, np.ones(4, np.float32))  # takes the release along
    assert (view == 0xDB).all()


def test_freed_inputs_are_overwritten(debugging: Caller) -> None:
    address = filled(debugging, 1)
    view = debugging.lane.talk.memory.shown.find(address.__array_interface__["data"][0], 64)
    assert view is not None
    memory = view.memory
    del address, view
    gc.collect()
    assert used(debugging) == 0
    assert (memory == 0xDB).all()
