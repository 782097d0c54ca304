# SPDX-License-Identifier: Apache-2.0
"""Input chunks for one tensor: made of exactly its size, exported whole, given back one by one."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from thirdrail.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from thirdrail.v1.tensor_pb2 import ArenaRef
from thirdrail_server.worker.input_arena import InputArena

PAGE = mmap.PAGESIZE
BYTES_MAX = 4 << 20


class Charged:
    """How much the arena has asked room for."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, size: int, /, *, is_spare: bool = False) -> None:
        self.size += size


@pytest.fixture
def charged() -> Charged:
    return Charged()


@pytest.fixture
def arena(charged: Charged) -> Iterator[InputArena]:
    arena = InputArena(BYTES_MAX, charged, alone_chunks_max=3)
    yield arena
    for mapping in arena.close():
        mapping.close()


def grow_alone(arena: InputArena, size: int) -> ArenaRef:
    """A reference to a new tensor of this size that has a chunk to itself."""
    chunk = arena.grow(size, is_alone=True)
    chunk.close()
    assert chunk.message.alone
    return ArenaRef(epoch=arena.epoch, chunk=chunk.message.chunk, size=size)


def test_a_chunk_without_a_descriptor_leaves_nothing(
    arena: InputArena, charged: Charged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> int:
        kept.append(fd)
        raise OSError(errno.EMFILE, "Too many open files")

    kept: list[int] = []
    monkeypatch.setattr(os, "dup", fail)
    with pytest.raises(OSError, match="Too many open files"):
        arena.grow(PAGE, is_alone=True)
    assert (charged.size, arena.total_bytes) == (0, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept[0])


def test_a_chunk_has_the_tensors_size_and_can_be_sealed_later(
    arena: InputArena, charged: Charged
) -> None:
    ref = grow_alone(arena, PAGE + 1)
    memory = arena.alone(ref)
    assert len(memory) == 2 * PAGE == arena.total_bytes == charged.size
    assert not fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    memory.mapping[:1] = b"\x07"
    assert arena.view("x", ref)[0] == 7


def test_other_chunks_cannot_be_exported(arena: InputArena) -> None:
    chunk = arena.grow(PAGE)
    chunk.close()
    with pytest.raises(InvalidArgument, match="chunk 0 of the input arena can hold several"):
        arena.alone(ArenaRef(epoch=arena.epoch, size=PAGE))
    with pytest.raises(InvalidArgument, match="chunk 7 of"):
        arena.alone(ArenaRef(epoch=arena.epoch, chunk=7, size=PAGE))


@pytest.mark.parametrize(("offset", "size"), [(64, PAGE), (0, PAGE), (0, 2 * PAGE + 1), (0, 0)])
def test_only_the_whole_tensor_is_exported(arena: InputArena, offset: int, size: int) -> None:
    ref = grow_alone(arena, 2 * PAGE)
    with pytest.raises(InvalidArgument, match="exported as the one tensor it was made for"):
        arena.alone(ArenaRef(epoch=arena.epoch, chunk=ref.chunk, offset=offset, size=size))


def test_a_chunk_is_given_back(arena: InputArena, charged: Charged) -> None:
    arena.grow(PAGE).close()
    before = arena.total_bytes
    ref = grow_alone(arena, PAGE)
    in_flight = arena.view("x", ref)
    memory = arena.drop(ref.chunk)
    assert memory is not None
    memory.close()
    assert arena.total_bytes == charged.size == before
    assert not in_flight.any()  # on memory that is still there
    with pytest.raises(FailedPrecondition, match="refers to chunk 1, given back"):
        arena.view("x", ref)
    with pytest.raises(InvalidArgument):
        arena.alone(ref)
    assert arena.drop(ref.chunk) is None


def test_chunks_with_several_tensors_are_not_given_back(arena: InputArena) -> None:
    arena.grow(PAGE).close()
    assert arena.drop(0) is None
    assert arena.drop(99) is None
    assert arena.view("x", ArenaRef(epoch=arena.epoch, size=PAGE)).size == PAGE


def test_an_exported_chunk_is_charged_and_let_go_by_others(
    arena: InputArena, charged: Charged
) -> None:
    ref = grow_alone(arena, PAGE)
    memory = arena.alone(ref)
    for _ in range(2):  # exported twice
        arena.on_exported(ref.chunk)
    assert arena.total_bytes == charged.size == 0
    assert arena.view("x", ref).size == PAGE  # still its client's input
    assert arena.close() == []
    os.fstat(memory.fd)
    memory.close()


def test_an_exported_chunk_that_is_dropped_is_not_counted_twice(
    arena: InputArena, charged: Charged
) -> None:
    ref = grow_alone(arena, PAGE)
    arena.on_exported(ref.chunk)
    memory = arena.drop(ref.chunk)
    assert memory is not None
    memory.close()
    assert arena.total_bytes == charged.size == 0


def test_closing_lets_go_of_the_descriptors(arena: InputArena) -> None:
    memory = arena.alone(grow_alone(arena, PAGE))
    (mapping,) = arena.close()
    assert mapping is memory.mapping
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory.fd)
    mapping.close()


def test_chunks_and_bytes_are_bounded(arena: InputArena, charged: Charged) -> None:
    with pytest.raises(ResourceExhausted, match=f"{BYTES_MAX + 1} more bytes of input memory"):
        arena.grow(BYTES_MAX + 1, is_alone=True)
    refs = [grow_alone(arena, PAGE) for _ in range(3)]
    with pytest.raises(ResourceExhausted, match="3 tensors in memory of their own"):
        arena.grow(PAGE, is_alone=True)
    assert charged.size == 3 * PAGE
    memory = arena.drop(refs[0].chunk)
    assert memory is not None
    memory.close()
    grow_alone(arena, PAGE)
