# SPDX-License-Identifier: Apache-2.0
"""Output slots: leased once, released once; late, doubled and foreign releases change nothing."""

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from thirdrail.errors import Cancelled, FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.chunks import CHUNK_BYTES_MIN
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.output_arena import POISON, SPARE_BYTES_MAX, OutputArena

WAIT_S_MAX = 20


def test_slots_do_not_share_memory() -> None:
    arena = OutputArena(1 << 24)
    (ref_a, a), (ref_b, b) = arena.lease(1000), arena.lease(1000)
    a[:], b[:] = 1, 2
    assert a.tolist() == [1] * 1000
    assert (ref_a.slot, ref_a.generation) != (ref_b.slot, ref_b.generation)


def test_a_released_slot_comes_again_with_another_generation() -> None:
    arena = OutputArena(1 << 24)
    first, _ = arena.lease(1000)
    arena.release(first.epoch, first.slot, first.generation)
    second, _ = arena.lease(1000)
    assert (second.slot, second.offset) == (first.slot, first.offset)
    assert second.generation != first.generation


@pytest.mark.parametrize(
    ("epoch", "slot", "generation"),
    [(0, 0, 1), (0, 99, 1), (1, 0, 0), (0, 0, 0)],
    ids=["generation before", "unknown slot", "other epoch", "as it is, but twice"],
)
def test_a_release_that_does_not_fit_is_ignored_and_counted(
    epoch: int, slot: int, generation: int
) -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    if (epoch, slot, generation) == (0, 0, 0):
        arena.release(ref.epoch, ref.slot, ref.generation)
    before = arena.leased_bytes
    arena.release(ref.epoch + epoch, ref.slot + slot, ref.generation - generation)
    assert arena.leased_bytes == before
    assert arena.stale_releases == 1


def test_slot_zero_means_no_slot_and_cannot_be_released() -> None:
    arena = OutputArena(1 << 24)
    arena.release(arena.epoch, 0, 0)
    assert arena.stale_releases == 1


def test_the_arena_grows_by_chunks_and_ends_at_its_bound() -> None:
    arena = OutputArena(3 * CHUNK_BYTES_MIN)
    arena.lease(CHUNK_BYTES_MIN)
    arena.lease(CHUNK_BYTES_MIN)
    chunks = arena.take_new_chunks()
    assert [chunk.message.chunk for chunk in chunks] == list(range(len(chunks)))
    arena.lease(CHUNK_BYTES_MIN)
    with pytest.raises(ResourceExhausted, match="were not released yet"):
        arena.lease(1)
    assert arena.total_bytes <= 3 * CHUNK_BYTES_MIN
    for chunk in (*chunks, *arena.take_new_chunks()):
        chunk.close()


class Maker:
    """Makes chunks that no client sees, each when it is let."""

    def __init__(self) -> None:
        self.is_asked = threading.Semaphore(0)
        self.may_make = threading.Semaphore(0)

    def __call__(self, size: int, *, client_writes: bool) -> tuple[int, mmap.mmap]:
        self.is_asked.release()
        assert self.may_make.acquire(timeout=WAIT_S_MAX)
        return os.open(os.devnull, os.O_RDONLY), mmap.mmap(-1, size)


def test_nobody_waits_while_memory_is_made_for_another() -> None:
    """Above all not the worker's loop, which releases and looks for all sessions."""
    make = Maker()
    arena = OutputArena(1 << 24, make_chunk=make)
    make.may_make.release()
    ref, _ = arena.lease(1000)
    with ThreadPoolExecutor() as threads:
        leasing = threads.submit(arena.lease, 2 * CHUNK_BYTES_MIN)
        for _ in range(2):
            assert make.is_asked.acquire(timeout=WAIT_S_MAX)
        try:
            threads.submit(lambda: arena.view("x", ref).tolist()).result(WAIT_S_MAX)
            threads.submit(arena.release, ref.epoch, ref.slot, ref.generation).result(WAIT_S_MAX)
            assert threads.submit(lambda: arena.lease(1000)[0].slot).result(WAIT_S_MAX) == ref.slot
        finally:
            make.may_make.release()
        leased, _ = leasing.result(WAIT_S_MAX)
    assert leased.chunk == 1
    for chunk in arena.take_new_chunks():
        chunk.close()


def test_memory_that_is_made_too_late_is_given_back() -> None:
    charged: list[int] = []

    def charge(size: int, /, *, is_spare: bool = False) -> None:
        charged.append(size)

    make = Maker()
    arena = OutputArena(1 << 24, charge, make)
    with ThreadPoolExecutor() as threads:
        leasing = threads.submit(arena.lease, 1000)
        assert make.is_asked.acquire(timeout=WAIT_S_MAX)
        assert arena.close() == []
        make.may_make.release()
        with pytest.raises(Cancelled):
            leasing.result(WAIT_S_MAX)
    assert (sum(charged), arena.total_bytes, arena.take_new_chunks()) == (0, 0, [])


def test_chunks_are_small_enough_to_be_made_on_the_loop() -> None:
    make = Maker()
    arena = OutputArena(1 << 30, make_chunk=make)
    for _ in range(100):
        make.may_make.release()
        arena.lease(CHUNK_BYTES_MIN)
    chunks = arena.take_new_chunks()
    assert max(chunk.message.size for chunk in chunks) == SPARE_BYTES_MAX
    for chunk in chunks:
        chunk.close()


# A slot as an input


def test_a_leased_slot_can_be_read_but_not_written() -> None:
    arena = OutputArena(1 << 24)
    ref, memory = arena.lease(1000)
    memory[:] = 7
    view = arena.view("x", ref)
    assert view.tolist() == [7] * 1000
    assert not view.flags.writeable
    part = arena.view("x", part_of(ref, offset=ref.offset + 64, size=8))
    memory[64:72] = range(8)
    assert part.tolist() == list(range(8))


def part_of(ref: tensor_pb2.ArenaRef, **changes: int) -> tensor_pb2.ArenaRef:
    fields = {field.name: value for field, value in ref.ListFields()}
    return tensor_pb2.ArenaRef(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"slot": 0}, FailedPrecondition),
        ({"slot": 99}, FailedPrecondition),
        ({"generation": 2}, FailedPrecondition),
        ({"generation": 0}, FailedPrecondition),
        ({"epoch": 0}, FailedPrecondition),
        ({"chunk": 1}, InvalidArgument),
        ({"offset": 0}, InvalidArgument),  # another slot's
        ({"offset": 1024 + 8}, InvalidArgument),
        ({"offset": 1024 + 64}, InvalidArgument),  # and as long as before
        ({"size": 1001}, InvalidArgument),
        ({"size": (1 << 64) - 1}, InvalidArgument),
        ({"offset": (1 << 64) - 64}, InvalidArgument),
    ],
)
def test_a_reference_to_anything_but_the_slot_is_refused(
    changes: dict[str, int], error: type[Exception]
) -> None:
    arena = OutputArena(1 << 24)
    arena.lease(1000)
    ref, _ = arena.lease(1000)
    assert (ref.offset, ref.generation) == (1024, 1)
    with pytest.raises(error, match="tensor 'x' refers to"):
        arena.view("x", part_of(ref, **changes))


def test_a_released_slot_cannot_be_referred_to() -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    arena.release(ref.epoch, ref.slot, ref.generation)
    with pytest.raises(FailedPrecondition, match="holds no result or was released"):
        arena.view("x", ref)


def test_a_slot_that_is_read_is_not_given_away_before_its_last_view_is_gone() -> None:
    arena = OutputArena(1 << 24)
    ref, memory = arena.lease(1000)
    memory[:] = 7
    first, second = arena.view("x", ref), arena.view("x", ref)
    rows = second.view(np.uint16).reshape(20, 25)[3:5].T  # as a model may see it
    arena.release(ref.epoch, ref.slot, ref.generation)
    assert arena.leases == 0
    del first, second
    other, _ = arena.lease(1000)
    assert other.offset != ref.offset
    assert rows.tolist() == [[0x0707] * 2] * 25
    del rows
    again, _ = arena.lease(1000)
    assert again.offset == ref.offset
    assert (again.slot, again.generation) == (ref.slot, ref.generation + 1)


def test_a_slot_that_was_read_before_it_is_released_is_free_once() -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    view = arena.view("x", ref)
    del view
    arena.release(ref.epoch, ref.slot, ref.generation)
    assert len({arena.lease(1000)[0].offset for _ in range(3)}) == 3


def test_a_put_off_release_that_comes_twice_frees_once() -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    view = arena.view("x", ref)
    for _ in range(3):
        arena.release(ref.epoch, ref.slot, ref.generation)
    assert arena.stale_releases == 2
    del view
    assert len({arena.lease(1000)[0].offset for _ in range(3)}) == 3


def test_a_release_after_the_last_view_is_gone_frees_once() -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    arena.view("x", ref)  # and gone at once
    arena.release(ref.epoch, ref.slot, ref.generation)
    assert arena.leased_bytes == 0
    (first, _), (second, _) = arena.lease(1000), arena.lease(1000)
    assert first.slot != second.slot


def test_a_run_that_ends_after_the_session_gives_its_slot_back_uncounted() -> None:
    arena = OutputArena(1 << 24)
    ref, _ = arena.lease(1000)
    arena.close()
    arena.release(ref.epoch, ref.slot, ref.generation)
    assert arena.leases == 0


def test_released_slots_are_overwritten_where_that_is_wished() -> None:
    arena = OutputArena(1 << 24)
    (ref, memory), (kept, other) = arena.lease(1000), arena.lease(1000)
    memory[:], other[:] = 1, 2
    arena.poisons = True
    arena.release(ref.epoch, ref.slot, ref.generation)
    assert memory.tolist() == [POISON] * 1000
    assert other.tolist() == [2] * 1000
    arena.release(kept.epoch, kept.slot, kept.generation + 1)
    assert other.tolist() == [2] * 1000


# Input memory


def reference(arena: InputArena, **changes: int) -> tensor_pb2.ArenaRef:
    fields = {"epoch": arena.epoch, "chunk": 0, "offset": 0, "size": 64}
    return tensor_pb2.ArenaRef(**(fields | changes))


def test_an_input_reference_is_a_view_of_the_clients_memory() -> None:
    arena = InputArena(1 << 24)
    chunk = arena.grow(1000)
    assert arena.view("x", reference(arena)).nbytes == 64
    assert arena.view("x", reference(arena, size=chunk.message.size)).nbytes == chunk.message.size
    chunk.close()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epoch": 0}, FailedPrecondition),
        ({"chunk": 1}, InvalidArgument),
        ({"offset": 1}, InvalidArgument),
        ({"offset": 1 << 20}, InvalidArgument),
        ({"offset": (1 << 64) - 64}, InvalidArgument),
        ({"size": (1 << 64) - 1}, InvalidArgument),
        ({"size": (1 << 20) + 1}, InvalidArgument),
    ],
)
def test_an_input_reference_outside_the_arena_is_refused(
    changes: dict[str, int], error: type[Exception]
) -> None:
    arena = InputArena(1 << 24)
    arena.grow(1000).close()
    with pytest.raises(error, match="tensor 'x' refers to"):
        arena.view("x", reference(arena, **changes))
