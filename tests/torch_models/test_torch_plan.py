# SPDX-License-Identifier: Apache-2.0
"""The bytes of a plan of AOTInductor, and the shapes that it takes. Without PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from thirdrail import dtypes
from thirdrail.tensors import TensorSpec
from thirdrail_engines.engine import EngineInputError, ModelFileError
from thirdrail_engines.torch_plan import Sizes, read_plan, write_plan

BOUNDS, DAMAGED = b'{"s0": [1, 64], "s1": [2, null]}', "its plan has a damaged header"
FP32 = dtypes.BY_NAME["FP32"]
SIZES = Sizes({"x": ("s0", 8), "y": ("s1", "s0")}, {"s0": (1, 64), "s1": (2, None)})
INPUTS = (TensorSpec("x", FP32, (-1, 8)), TensorSpec("y", FP32, (-1, -1)))
OUTPUTS = (TensorSpec("z", dtypes.BY_NAME["INT64"], (-1,)),)


@pytest.fixture
def plan(tmp_path: Path) -> bytes:
    package, path = tmp_path / "package", tmp_path / "plan"
    package.write_bytes(b"library" * 100)
    write_plan(path, package, INPUTS, OUTPUTS, SIZES)
    return path.read_bytes()


def test_what_is_written_is_read(plan: bytes) -> None:
    read = read_plan("model.pt2", plan)
    assert (read.inputs, read.outputs, read.sizes) == (INPUTS, OUTPUTS, SIZES)
    assert bytes(read.package) == b"library" * 100


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda plan: b"", "its plan is none that AOTInductor's builder made"),
        (lambda plan: b"PK" + plan, "its plan is none that AOTInductor's builder made"),
        (lambda plan: plan[:60], "its plan has a damaged header"),
        (lambda plan: plan.replace(b'"FP32"', b'"FP99"'), "its plan has a damaged header"),
        (lambda plan: plan.replace(b'["s0", 8]', b'["s9", 8]'), "its plan has a damaged header"),
        (lambda plan: plan.replace(b'["s0", 8]', b'["s0",-8]'), "its plan has a damaged header"),
        (lambda plan: plan.replace(BOUNDS, b"[]" + b" " * (len(BOUNDS) - 2)), DAMAGED),
        (lambda plan: plan[:-1], "the package in its plan has 699 bytes, expected 700"),
        (lambda plan: plan + b"!", "the package in its plan has 701 bytes, expected 700"),
    ],
)
def test_what_is_no_whole_plan_is_refused(plan: bytes, damage: object, expected: str) -> None:
    assert callable(damage)
    with pytest.raises(ModelFileError) as caught:
        read_plan("model.pt2", damage(plan))
    assert str(caught.value) == f"model.pt2: {expected}"


@pytest.mark.parametrize("x", [(1, 8), (64, 8)])
def test_sizes_within_bounds_are_taken(x: Sequence[int]) -> None:
    SIZES.check({"x": x, "y": (2, x[0])})
    SIZES.check({"x": x, "y": (1 << 40, x[0])})


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ((0, 8), (2, 0), "dimension 0 of input 'x' is 0, the model takes 1 to 64"),
        ((65, 8), (2, 65), "dimension 0 of input 'x' is 65, the model takes 1 to 64"),
        ((3, 7), (2, 3), "dimension 1 of input 'x' is 7, the model takes 8"),
        ((3, 8, 1), (2, 3), "input 'x' has 3 dimensions, not 2"),
        ((3, 8), (1, 3), "dimension 0 of input 'y' is 1, the model takes 2 or more"),
        (
            (3, 8), (2, 4),
            "dimension 1 of input 'y' is 4, and dimension 0 of input 'x' is 3: they must be equal",
        ),
    ],
)  # fmt: skip
def test_other_sizes_are_refused(x: Sequence[int], y: Sequence[int], expected: str) -> None:
    with pytest.raises(EngineInputError) as caught:
        SIZES.check({"x": x, "y": y})
    assert str(caught.value) == expected
