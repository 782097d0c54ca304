# SPDX-License-Identifier: Apache-2.0
"""Which sizes a program takes, found out for code that does not check them itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thirdrail_engines.plans import BuildError, BuildFault

pytestmark = pytest.mark.needs_torch

SaveModel = Callable[..., Path]


def sizes_of(path: Path) -> Any:
    from thirdrail_engines.torch_sources import exported, sizes

    return sizes.sizes_of(path, exported.load_exported(path))


def test_equal_sizes_have_one_name(save_exported: SaveModel) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    examples = (torch.ones(2, 8), torch.ones(2, 1))
    found = sizes_of(save_exported(TwoInTwoOut(), examples, ({0: "rows"}, {0: "rows"})))
    (name,) = found.bounds
    assert found.inputs == {"words": (name, 8), "mask": (name, 1)}
    assert found.bounds == {name: (1, 1 << 30)}


def test_a_size_by_a_formula_is_refused(tmp_path: Path) -> None:
    import torch

    from support.torch_modules import Identity

    rows = torch.export.Dim("rows", min=1, max=64)
    shapes = ({0: 2 * rows},)
    program = torch.export.export(Identity(), (torch.ones(4, 3),), dynamic_shapes=shapes)
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    with pytest.raises(BuildError, match=r"a size of input 'x' follows .* by a formula") as caught:
        sizes_of(path)
    assert caught.value.fault is BuildFault.REFUSED


def test_another_order_of_elements_is_refused(save_exported: SaveModel) -> None:
    import torch

    from support.torch_modules import Identity

    path = save_exported(Identity(), (torch.ones(3, 4).t(),))
    with pytest.raises(BuildError, match="in another order than that of rows"):
        sizes_of(path)


def save_open(path: Path, dim: Any) -> Path:
    """Rows of 3, and of the first dimension what `dim` says."""
    import torch

    from support.torch_modules import Identity

    program = torch.export.export(Identity(), (torch.ones(4, 3),), dynamic_shapes=({0: dim},))
    torch.export.save(program, path)
    return path


def test_a_size_of_which_nothing_was_said_takes_no_single_row_and_is_refused(
    tmp_path: Path,
) -> None:
    """As it is with torch.export: 0 and 1 are not what AUTO is for."""
    import torch

    path = save_open(tmp_path / "model.pt2", torch.export.Dim.AUTO)
    with pytest.raises(BuildError, match=r"'x' was exported for two rows and more.*min=1"):
        sizes_of(path)
    (bounds,) = sizes_of(
        save_open(tmp_path / "said.pt2", torch.export.Dim("rows", min=2, max=9))
    ).bounds.values()
    assert bounds == (2, 9)


def test_a_reference_takes_what_compiled_code_takes(tmp_path: Path) -> None:
    """By itself, a program that was exported for two rows and more takes one."""
    import numpy as np
    import torch

    from thirdrail_engines import EngineInputError, EngineOptions
    from thirdrail_engines.torch_engine import load_torch

    path = save_open(tmp_path / "model.pt2", torch.export.Dim("rows", min=2, max=9))
    row = {"x": np.ones((1, 3), np.float32)}
    plain = load_torch(path, options=EngineOptions())
    assert plain.run(row, ["output"], {})["output"].shape == (1, 3)
    bounded = load_torch(path, options=EngineOptions(), is_within_bounds=True)
    with pytest.raises(EngineInputError, match="dimension 0 of input 'x' is 1, the model takes 2"):
        bounded.run(row, ["output"], {})
