# SPDX-License-Identifier: Apache-2.0
"""The decisions about devices, which need none: identity, errors, profiles, places, pools."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail import dtypes
from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import ALIGNMENT_BYTES, PinnedMemory
from thirdrail_engines.cuda.errors import (
    STICKY,
    CudaError,
    DeviceFault,
    OutOfDeviceMemory,
    error_of,
)
from thirdrail_engines.cuda.graph_cache import GraphCache, Way
from thirdrail_engines.cuda.identity import DeviceFacts, choose_device, uuid_text
from thirdrail_engines.cuda.layout import lay_out
from thirdrail_engines.cuda.program import choose_profile, refusal
from thirdrail_engines.cuda.staging import BLOCK_BYTES_MIN, PinnedPool, block_bytes
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.plans import BuildError, Profile, ShapeRange

# Identity


def facts(uuid: str) -> DeviceFacts:
    return DeviceFacts(uuid, f"device {uuid[4:6]}", (8, 6), 1 << 30, (13, 0))


FOUND = (
    facts("GPU-aa000000-0000-0000-0000-000000000001"),
    facts("GPU-ab000000-0000-0000-0000-000000000002"),
    facts("MIG-aa000000-0000-0000-0000-000000000003"),
)


def test_a_uuid_is_written_as_people_know_it() -> None:
    octets = bytes(range(16))
    assert uuid_text(octets, "NVIDIA H100") == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert uuid_text(octets, "NVIDIA A100-SXM4-40GB MIG 1g.5gb").startswith("MIG-0001")
    assert uuid_text(octets, "MIGHTY").startswith("GPU-")
    with pytest.raises(ValueError, match="16"):
        uuid_text(b"short", "NVIDIA H100")


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (FOUND[1].uuid, 1),
        (FOUND[1].uuid.upper(), 1),
        ("ab000000-0000-0000-0000-000000000002", 1),
        ("GPU-ab", 1),
        ("ab00", 1),
        ("MIG-aa", 2),
        ("GPU-aa", 0),
    ],
)
def test_a_device_is_chosen_by_uuid(wanted: str, index: int) -> None:
    assert choose_device(wanted, FOUND) is FOUND[index]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("", "3 CUDA devices are here, name one by UUID: GPU-aa000000"),
        ("aa", "2 CUDA devices of the UUID 'aa'"),
        ("GPU-ff", "no CUDA device of the UUID 'GPU-ff'. There is: GPU-aa000000"),
        ("0", "names no device: expected a UUID, an ordinal means another device"),
        ("cuda:0", "'cuda:0' names no device"),
        ("GPU-", "names no device"),
    ],
)
def test_what_names_no_single_device_is_told_those_that_are(wanted: str, text: str) -> None:
    with pytest.raises(BuildError, match=text) as caught:
        choose_device(wanted, FOUND)
    assert caught.value.fault == "missing"


def test_the_only_device_needs_no_name() -> None:
    assert choose_device("", FOUND[:1]) is FOUND[0]
    with pytest.raises(BuildError, match="no CUDA device is here"):
        choose_device("", ())


# Errors


def test_codes_become_errors_of_their_kind() -> None:
    for code in STICKY:
        lost = error_of(code, "cuEventQuery")
        assert isinstance(lost, DeviceFault)
        assert isinstance(lost, DeviceLost)
        assert not isinstance(lost, EngineError), "or a run's failure would hide it"
    full = error_of("CUDA_ERROR_OUT_OF_MEMORY", "cuMemAlloc", "out of memory")
    assert isinstance(full, OutOfDeviceMemory)
    assert str(full) == "cuMemAlloc: out of memory (out of memory)"
    assert type(error_of("CUDA_ERROR_INVALID_VALUE", "cuMemFree")) is CudaError


# Profiles


def profile(*ranges: tuple[int, int, int]) -> Profile:
    return Profile({"x": ShapeRange(*(tuple(r[i] for r in ranges) for i in range(3)))})


def test_of_the_profiles_that_take_a_shape_the_nearest_is_chosen() -> None:
    profiles = (profile((1, 8, 8)), profile((1, 1, 64)), profile((1, 64, 64)))
    assert [choose_profile(profiles, {"x": (n,)}) for n in (1, 4, 5, 8, 9, 40, 64, 65)] == [
        1,
        1,
        0,
        0,
        1,
        2,
        2,
        None,
    ]
    assert choose_profile((), {"x": (3,)}) == 0


@given(
    st.lists(st.tuples(*[st.integers(0, 20)] * 3).map(sorted), min_size=1, max_size=5),
    st.integers(0, 20),
)
def test_a_chosen_profile_takes_the_shape(ranges: list[list[int]], size: int) -> None:
    profiles = tuple(profile(tuple(each)) for each in ranges)  # type: ignore[arg-type]
    index = choose_profile(profiles, {"x": (size,)})
    fitting = [low <= size <= high for low, _, high in ranges]
    assert (index is None) == (not any(fitting))
    if index is not None:
        assert fitting[index]
    else:
        assert f"[{size}]" in refusal(profiles, {"x": (size,)})


def test_shapes_that_no_profile_takes_together_are_told() -> None:
    profiles = tuple(
        Profile({name: ShapeRange((size,), (size,), (size,)) for name in "xy"}) for size in (1, 2)
    )
    shapes = {"x": (1,), "y": (2,)}
    assert choose_profile(profiles, shapes) is None
    assert refusal(profiles, shapes) == (
        "no profile of this model takes these shapes together: 'x' [1], 'y' [2]"
    )


# Places


@given(st.lists(st.tuples(st.sampled_from(["FP32", "UINT8", "FP64"]), st.integers(0, 999))))
def test_tensors_lie_aligned_and_apart(kinds: list[tuple[str, int]]) -> None:
    tensors = [TensorSpec(str(i), dtypes.BY_NAME[kind], (-1,)) for i, (kind, _) in enumerate(kinds)]
    layout = lay_out(tensors, {str(i): (count,) for i, (_, count) in enumerate(kinds)})
    end = 0
    for tensor in tensors:
        offset = layout.offsets[tensor.name]
        assert offset % ALIGNMENT_BYTES == 0
        assert offset >= end
        end = offset + max(1, layout.sizes[tensor.name])
    assert layout.total_bytes == max(end, 1)


# Graphs


@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=60))
def test_graphs_are_recorded_on_the_second_run_and_bounded(
    graphs_max: int, runs: list[tuple[int, bool]]
) -> None:
    cache: GraphCache[int] = GraphCache(graphs_max)
    alive: set[int] = set()
    seen: dict[int, int] = {}
    refused: set[int] = set()
    for key, can_record in runs:
        way = cache.way(key)
        if way is Way.LAUNCH:
            assert key in alive
            assert cache.graph(key) == key
        elif way is Way.RECORD:
            assert key not in alive
            assert seen.get(key, 0) >= 1
            if can_record:
                alive.add(key)
                alive -= set(cache.keep(key, key))
            else:
                cache.refuse(key)
                refused.add(key)
        assert len(alive) == cache.figures.kept <= graphs_max
        seen[key] = seen.get(key, 0) + 1
    assert set(cache.clear()) == alive


def test_the_graph_that_was_used_least_recently_goes() -> None:
    cache: GraphCache[str] = GraphCache(2)
    for key in "ab":
        assert [cache.way(key), cache.way(key)] == [Way.PLAIN, Way.RECORD]
        assert cache.keep(key, key) == []
    assert cache.way("a") is Way.LAUNCH
    assert [cache.way("c"), cache.way("c")] == [Way.PLAIN, Way.RECORD]
    assert cache.keep("c", "c") == ["b"]


def test_what_cannot_be_recorded_is_tried_once() -> None:
    cache: GraphCache[str] = GraphCache(2)
    assert [cache.way("a"), cache.way("a")] == [Way.PLAIN, Way.RECORD]
    cache.refuse("a")
    assert [cache.way("a")] * 3 == [Way.PLAIN] * 3


# Staging


@given(st.integers(1, 1 << 40))
def test_blocks_are_powers_of_two_that_hold_what_was_asked(nbytes: int) -> None:
    size = block_bytes(nbytes)
    assert size & (size - 1) == 0
    assert size >= nbytes
    assert size == BLOCK_BYTES_MIN or size < 2 * nbytes


@given(
    st.integers(0, 100_000),
    st.lists(st.one_of(st.integers(1, 60_000), st.none()), max_size=40),
)
def test_pinned_memory_stays_within_its_bound(bytes_max: int, steps: list[int | None]) -> None:
    """None gives a block back."""
    device = TwinDevice()
    pool = PinnedPool(device, bytes_max)
    lent: list[PinnedMemory] = []
    for nbytes in steps:
        if nbytes is None:
            if lent:
                pool.give_back(lent.pop())
            continue
        block = pool.lend(nbytes)
        out = sum(each.view.nbytes for each in lent)
        assert (block is None) == (out + block_bytes(nbytes) > bytes_max)
        if block is not None:
            assert block.view.nbytes >= nbytes
            lent.append(block)
        figures = pool.figures
        assert sum(each.view.nbytes for each in lent) == figures.lent_bytes
        assert figures.lent_bytes <= figures.pinned_bytes <= max(bytes_max, 0)
    for block in lent:
        pool.give_back(block)
    pool.close()
    device.close()


def test_blocks_are_kept_and_used_again() -> None:
    device = TwinDevice()
    pool = PinnedPool(device, 1 << 16)
    first = pool.lend(5000)
    assert first is not None
    pool.give_back(first)
    assert pool.lend(8000) is first
    pool.give_back(first)
    pool.close()
    device.close()


def test_a_host_without_pinned_memory_copies_without() -> None:
    device = TwinDevice(pinned_bytes_max=4096)
    pool = PinnedPool(device, 1 << 20)
    assert pool.lend(10_000) is None
    assert pool.figures.refused == 1
    pool.close()
    device.close()
