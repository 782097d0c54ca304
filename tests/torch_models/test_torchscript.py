# SPDX-License-Identifier: Apache-2.0
"""TorchScript files that are refused, with what would do."""

from pathlib import Path

import pytest

from thirdrail_engines.plans import BuildError, Profile, ShapeRange
from thirdrail_engines.torch_sources import to_onnx

pytestmark = pytest.mark.needs_torch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("TakesNumber", "input 'count' is of the type int, expected tensors only: save the model"),
        ("TakesList", r"input 'all' is of the type List\[Tensor\], expected tensors only: save"),
        ("ReturnsDict", "it returns a dict, expected a tensor or a tuple of tensors: return one"),
    ],
)
def test_torchscript_of_other_things_than_tensors(
    onnx_folder: Path, tmp_path: Path, name: str, expected: str
) -> None:
    from support import torch_modules

    source = torch_modules.save_script(tmp_path / "model.pt", getattr(torch_modules, name)())
    shapes = ShapeRange((1, 2), (2, 2), (4, 2))
    with pytest.raises(BuildError, match=rf"^model\.pt: {expected}"):
        to_onnx(source, onnx_folder, lambda *_: None, [Profile({"x": shapes})])


def test_torchscript_by_another_name(onnx_folder: Path, tmp_path: Path) -> None:
    from support.torch_modules import Convolutions, save_script

    source = save_script(tmp_path / "model.pt2", Convolutions())
    with pytest.raises(BuildError, match=r"^model\.pt2: a TorchScript file: name it model\.pt$"):
        to_onnx(source, onnx_folder, lambda *_: None)
