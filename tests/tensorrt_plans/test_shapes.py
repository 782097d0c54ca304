# SPDX-License-Identifier: Apache-2.0
"""Whether profiles fit."""

import pytest

from thirdrail_engines.builds.result import PlanTensor
from thirdrail_engines.plans import Profile, Shape, ShapeRange
from thirdrail_engines.tensorrt.shapes import profile_fault

IMAGE = PlanTensor("x", "FP32", (-1, 3, -1), is_input=True)
SCALE = PlanTensor("scale", "FP32", (), is_input=True)


def profile(smallest: Shape, best: Shape, largest: Shape) -> Profile:
    return Profile({"x": ShapeRange(smallest, best, largest)})


GOOD = profile((1, 3, 8), (2, 3, 8), (4, 3, 64))


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ([GOOD], ""),
        ([GOOD, GOOD], ""),
        ([], "no profile is given, and input 'x' of shape [-1, 3, -1] has open dimensions"),
        ([GOOD, Profile({})], "profile 1 has no shapes for input 'x' of shape [-1, 3, -1]"),
        (
            [Profile({**GOOD.inputs, "y": GOOD.inputs["x"]})],
            "profile 0 names 'y', which is no input; the inputs are scale, x",
        ),
        (
            [profile((1, 3), (2, 3, 8), (4, 3, 64))],
            "profile 0 does not fit input 'x' of shape [-1, 3, -1]: [1, 3] has 2 dimensions",
        ),
        (
            [profile((1, 3, 8), (2, 1, 8), (4, 3, 64))],
            "profile 0 does not fit input 'x' of shape [-1, 3, -1]: [2, 1, 8] has another size "
            "where the model's is fixed",
        ),
        (
            [profile((1, 3, 8), (8, 3, 8), (4, 3, 64))],
            "profile 0 does not fit input 'x' of shape [-1, 3, -1]: [8, 3, 8] is above "
            "[4, 3, 64]; expected smallest, best, largest",
        ),
        (
            [profile((-1, 3, 8), (8, 3, 8), (8, 3, 64))],
            "profile 0 does not fit input 'x' of shape [-1, 3, -1]: [-1, 3, 8] has a negative size",
        ),
    ],
)
def test_profiles(profiles: list[Profile], expected: str) -> None:
    assert profile_fault([IMAGE, SCALE], profiles) == expected


def test_a_network_without_open_dimensions_needs_none() -> None:
    assert profile_fault([SCALE], []) == ""
    assert profile_fault([SCALE], [Profile({"scale": ShapeRange((), (), ())})]) == ""
