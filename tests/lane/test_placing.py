# SPDX-License-Identifier: Apache-2.0
"""Inputs in the client's arena: all of a call's or none, read from where they are, given back."""

import asyncio
import mmap
import threading

import pytest

from thirdrail.errors import InvalidArgument, ResourceExhausted, Unavailable
from thirdrail.lane.input_arena import COPY_ON_LOOP_BYTES_MAX, InputArena, Source

CHUNK = 4 << 20
LARGE = COPY_ON_LOOP_BYTES_MAX + 1


class File(Source):
    """Bytes that are read when the gate is open, or that cannot be read."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        self.size = size
        self.error = error
        self.gate = threading.Event()
        self.began = threading.Event()

    def read_into(self, target: memoryview) -> None:
        self.began.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        target[:] = b"f" * self.size


class Arena(InputArena):
    """One that has got all of its memory: `chunks` of CHUNK bytes."""

    def __init__(self, chunks: int = 1) -> None:
        super().__init__(7, chunks * CHUNK, lambda size: None)
        self.mappings = [mmap.mmap(-1, CHUNK) for _ in range(chunks)]
        for mapping in self.mappings:
            self.grown(mapping)


async def test_pieces_lie_where_their_references_say() -> None:
    arena, file = Arena(2), File(LARGE)
    file.gate.set()
    refs = await arena.place([b"abc", file, memoryview(b"x" * 100)])
    found = [arena.mappings[r.chunk][r.offset : r.offset + r.size] for r in refs]
    assert found == [b"abc", b"f" * LARGE, b"x" * 100]
    for ref in refs:
        arena.free(ref)
    assert arena.used_bytes == 0


@pytest.mark.parametrize("size", [10, LARGE])
async def test_a_source_that_fails_leaves_nothing_behind(size: int) -> None:
    arena, file = Arena(), File(size, InvalidArgument("it is gone"))
    file.gate.set()
    with pytest.raises(InvalidArgument, match="it is gone"):
        await arena.place([b"abc", file])
    assert arena.used_bytes == 0


@pytest.mark.parametrize("error", [None, InvalidArgument("it is gone")])
async def test_a_cancelled_reading_keeps_its_place_until_it_has_ended(
    error: Exception | None,
) -> None:
    arena, file = Arena(), File(LARGE, error)
    placing = asyncio.create_task(arena.place([file]))
    while not file.began.is_set():
        await asyncio.sleep(0.001)
    placing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await placing
    assert arena.used_bytes >= LARGE
    file.gate.set()
    while arena.used_bytes:
        await asyncio.sleep(0.001)


async def test_calls_that_wait_for_space_do_not_wait_for_each_other() -> None:
    arena, half = Arena(2), bytes(CHUNK - 64)
    first = await arena.place([half])
    waiting = [asyncio.create_task(arena.place([half, half])) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    assert arena.used_bytes == CHUNK - 64  # those who wait hold nothing
    for ref in first:
        arena.free(ref)
    while waiting:
        done, _ = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert done, "none of the calls came to its space"
        for task in done:
            waiting.remove(task)
            for ref in task.result():
                arena.free(ref)


@pytest.mark.parametrize("sizes", [[2 * CHUNK + 1], [CHUNK, CHUNK, 1], [CHUNK + 1]])
async def test_what_can_never_fit_is_refused(sizes: list[int]) -> None:
    arena = Arena(2)
    with pytest.raises(ResourceExhausted, match="does not fit"):
        await asyncio.wait_for(arena.place([bytes(size) for size in sizes]), 20)
    assert arena.used_bytes == 0


async def test_whoever_waits_is_told_when_the_lane_ends() -> None:
    arena = Arena()
    await arena.place([bytes(CHUNK)])
    waiting = asyncio.create_task(arena.place([b"x"]))
    await asyncio.sleep(0.01)
    arena.close(Unavailable("it ended"))
    with pytest.raises(Unavailable, match="it ended"):
        await waiting
