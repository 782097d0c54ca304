# SPDX-License-Identifier: Apache-2.0
"""The arena allocator: pieces never overlap, and freeing everything gives everything back."""

from hypothesis import given
from hypothesis import strategies as st

from thirdrail.lane.allocator import ALIGNMENT_BYTES, ArenaAllocator

CHUNK = 1 << 16


def test_a_piece_is_aligned_and_rounded_up() -> None:
    arena = ArenaAllocator()
    arena.add_chunk(CHUNK)
    assert arena.allocate(1) == (0, 0)
    assert arena.allocate(65) == (0, ALIGNMENT_BYTES)
    assert arena.allocate(0) == (0, 3 * ALIGNMENT_BYTES)
    assert arena.used_bytes == 4 * ALIGNMENT_BYTES


def test_what_does_not_fit_is_refused_until_a_chunk_comes() -> None:
    arena = ArenaAllocator()
    arena.add_chunk(CHUNK)
    assert arena.allocate(CHUNK + 1) is None
    arena.add_chunk(2 * CHUNK)
    assert arena.allocate(CHUNK + 1) == (1, 0)


def test_freed_neighbours_become_one_piece() -> None:
    arena = ArenaAllocator()
    arena.add_chunk(3 * ALIGNMENT_BYTES)
    places = [arena.allocate(1) for _ in range(3)]
    for index in (0, 2, 1):
        place = places[index]
        assert place is not None
        arena.free(*place)
    assert arena.allocate(3 * ALIGNMENT_BYTES) == (0, 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, CHUNK)), max_size=60))
def test_pieces_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    arena = ArenaAllocator()
    for _ in range(2):
        arena.add_chunk(CHUNK)
    held: dict[tuple[int, int], int] = {}
    for is_free, number in steps:
        if is_free and held:
            place = sorted(held)[number % len(held)]
            arena.free(*place)
            del held[place]
            continue
        got = arena.allocate(number)
        if got is None:
            continue
        chunk, offset = got
        assert offset + number <= CHUNK
        for (other_chunk, start), size in held.items():
            assert other_chunk != chunk or offset + number <= start or start + size <= offset
        held[got] = number
    for place in held:
        arena.free(*place)
    assert arena.used_bytes == 0
    assert {arena.allocate(CHUNK), arena.allocate(CHUNK)} == {(0, 0), (1, 0)}


def test_the_largest_free_piece() -> None:
    allocator = ArenaAllocator()
    assert allocator.largest_free_bytes == 0
    allocator.add_chunk(256)
    allocator.add_chunk(512)
    assert allocator.largest_free_bytes == 512
    place = allocator.allocate(512)
    assert place == (1, 0)
    assert allocator.largest_free_bytes == 256
    allocator.free(*place)
    assert allocator.largest_free_bytes == 512
