# SPDX-License-Identifier: Apache-2.0
"""Output slots: leased once, released once; late, doubled and foreign releases change nothing."""

import pytest

from thirdrail.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.arenas import CHUNK_BYTES_MIN, InputArena, OutputArena


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
