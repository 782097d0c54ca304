# SPDX-License-Identifier: Apache-2.0
"""Profiles follow from the batch size, or are given; what is missing comes with lines to write."""

from collections.abc import Mapping, Sequence

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import TensorSpec
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.plans import BuildError, BuildFault, Profile, ShapeRange
from thirdrail_engines.profiles import (
    BatchRows,
    ProfileError,
    profiles_for,
    read_shape_range,
    write_shape_range,
)
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig

ROWS = BatchRows(best=4, largest=8)


def tensors(**shapes: Sequence[int]) -> list[TensorSpec]:
    return [TensorSpec(name, BY_NAME["FP32"], tuple(shape)) for name, shape in shapes.items()]


def ranges(**texts: str) -> dict[str, ShapeRange]:
    return {name: read_shape_range(text) for name, text in texts.items()}


def parameters(lines: str) -> dict[str, str]:
    """Of lines as they stand in config.pbtxt."""
    config = text_format.Parse(lines, ModelConfig())
    return {key: value.string_value for key, value in config.parameters.items()}


def test_an_open_first_dimension_follows_from_the_batch_size() -> None:
    inputs = tensors(x=[-1, 3, 32], y=[-1], z=[2, 5])
    expected = Profile(ranges(x="1x3x32,4x3x32,8x3x32", y="1,4,8"))
    assert profiles_for(inputs, (), ROWS) == (expected,)


def test_fixed_inputs_need_no_profile_and_optional_ones_are_constants() -> None:
    optional = TensorSpec("w", BY_NAME["FP32"], (-1,), optional=True)
    assert profiles_for([*tensors(x=[2, 3]), optional], (), None) == ()


def test_given_profiles_are_used_as_they_are() -> None:
    small, large = ranges(x="1x8,1x8,2x8"), ranges(x="1x8,4x16,8x32")
    inputs = tensors(x=[-1, -1], fixed=[3])
    assert profiles_for(inputs, (small, large), ROWS) == (Profile(small), Profile(large))
    # Saying what is so anyway is no mistake, and changes no plan.
    again = {**small, **ranges(fixed="3,3,3")}
    assert profiles_for(inputs, (again, large), ROWS) == (Profile(small), Profile(large))


@pytest.mark.parametrize(
    ("inputs", "rows", "expected"),
    [
        (
            tensors(x=[-1, 3, -1, -1]),
            ROWS,
            "nothing says those of axes 2 and 3 of input 'x' [-1, 3, -1, -1]; write into",
        ),
        (
            tensors(x=[-1, 3], state=[2, -1, 64]),
            ROWS,
            "nothing says those of axis 1 of input 'state' [2, -1, 64]; write into",
        ),
        (
            tensors(x=[-1, 3], y=[-1]),
            None,
            "axis 0 of input 'x' [-1, 3], axis 0 of input 'y' [-1]; set max_batch_size, or write",
        ),
        (
            tensors(x=[-1, -1]),
            None,
            "axes 0 and 1 of input 'x' [-1, -1]; write into config.pbtxt",
        ),
        (tensors(**{'a "b"\\\n.é': [-1, -1]}), BatchRows(16, 16), "axis 1 of input 'a"),
    ],
    ids=["image", "state", "unbatched", "both", "odd name"],
)
def test_what_is_missing_comes_with_lines_that_work(
    inputs: list[TensorSpec], rows: BatchRows | None, expected: str
) -> None:
    with pytest.raises(BuildError) as caught:
        profiles_for(inputs, (), rows)
    assert caught.value.fault is BuildFault.REFUSED
    said = str(caught.value)
    assert expected in said
    options = read_compile_options(parameters(said.partition("that you use: ")[2]))
    (profile,) = profiles_for(inputs, options.profiles, rows)
    assert set(profile.inputs) == {tensor.name for tensor in inputs}


def test_an_input_of_unknown_rank_must_be_given() -> None:
    inputs = tensors(x=[])
    unranked = frozenset({"x"})
    with pytest.raises(BuildError, match="input 'x', whose rank is not known either") as caught:
        profiles_for(inputs, (), ROWS, unranked)
    options = read_compile_options(parameters(str(caught.value).partition("you use: ")[2]))
    assert profiles_for(inputs, options.profiles, ROWS, unranked)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (
            ranges(x="1x3,4x3,8x3", z="1,4,8"),
            "profile.0.z: the model has no input 'z', its inputs are 'x', 'y'",
        ),
        (ranges(x="1,2,3", y="1,4,8"), "profile.0.x has shapes of 1 dimensions, the model's inp"),
        (
            ranges(x="1x3,4x4,8x4", y="1,4,8"),
            "profile.0.x has the size 4 on axis 1, where the model's input is fixed at 3: [-1, 3]",
        ),
        (
            ranges(x="1x3,4x3,4x3", y="1,4,8"),
            "profile.*.x take 1 to 4 rows, but max_batch_size 8 promises 1 to 8",
        ),
        (ranges(x="2x3,4x3,8x3", y="1,4,8"), "profile.*.x take 2 to 8 rows, but max_batch_size"),
    ],
    ids=["unknown", "rank", "fixed", "few rows", "no single row"],
)
def test_a_profile_that_contradicts_the_model(
    profile: Mapping[str, ShapeRange], expected: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        profiles_for(tensors(x=[-1, 3], y=[-1]), (profile,), ROWS)
    assert str(caught.value).startswith(expected)


def test_a_profile_must_name_every_open_input_and_the_missing_lines_work() -> None:
    inputs = tensors(x=[-1, 3], y=[-1, -1])
    given = ranges(x="1x3,2x3,8x3")
    with pytest.raises(ProfileError, match=r"profile 0 must .* and lacks 'y' \[-1, -1\]") as caught:
        profiles_for(inputs, (given,), ROWS)
    more = read_compile_options(parameters(str(caught.value).partition("fit the others: ")[2]))
    assert profiles_for(inputs, ({**given, **more.profiles[0]},), ROWS)


def test_several_profiles_share_the_promise_and_a_guess_promises_nothing() -> None:
    inputs = tensors(x=[-1])
    one, other = ranges(x="1,1,1"), ranges(x="2,4,8")
    assert len(profiles_for(inputs, (one, other), ROWS)) == 2
    assert profiles_for(inputs, (one,), BatchRows(4, 8, is_promised=False))
    with pytest.raises(ProfileError, match="profile 1 must name every input"):
        profiles_for(inputs, (one, {}), ROWS)


@pytest.mark.parametrize(
    ("profiles", "gap"),
    [
        ([ranges(x="1,2,2", y="1,2,2"), ranges(x="5,5,8", y="5,5,8")], "3 in 'x', 'y'"),
        ([ranges(x="1,1,4", y="5,6,8"), ranges(x="5,6,8", y="1,1,4")], "1 in"),
        ([ranges(x="1,4,8", y="1,4,6"), ranges(x="8,8,8", y="8,8,8")], "7 in"),
    ],
    ids=["between", "never together", "in one input"],
)
def test_every_number_of_rows_must_fit_into_a_profile(
    profiles: list[dict[str, ShapeRange]], gap: str
) -> None:
    inputs = tensors(x=[-1], y=[-1])
    with pytest.raises(
        ProfileError, match=f"^no profile takes a batch of {gap}.*promises every number"
    ):
        profiles_for(inputs, profiles, ROWS)
    assert profiles_for(inputs, [*profiles, ranges(x="1,4,8", y="1,4,8")], ROWS)


@pytest.mark.parametrize(("best", "largest"), [(0, 1), (2, 1)])
def test_batch_rows_are_in_order(best: int, largest: int) -> None:
    with pytest.raises(ValueError, match=f"best {best}, largest {largest}"):
        BatchRows(best, largest)


@given(st.lists(st.lists(st.integers(1, 99), min_size=3, max_size=3).map(sorted), min_size=1))
def test_a_range_survives_its_text(axes: list[list[int]]) -> None:
    smallest, best, largest = zip(*axes[:16], strict=True)
    given = ShapeRange(smallest, best, largest)
    assert read_shape_range(write_shape_range(given)) == given
