# SPDX-License-Identifier: Apache-2.0
"""PyTorch models as files. torch is imported by those tests only that are marked needs_torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SaveModel = Callable[..., Path]


@pytest.fixture
def save_exported(tmp_path: Path) -> SaveModel:
    """save_exported(module, examples, open_dims) -> the path of its .pt2."""

    def save(module: Any, examples: tuple[Any, ...], open_dims: Any = None) -> Path:
        from support import torch_modules

        return torch_modules.save_exported(tmp_path / "model.pt2", module, examples, open_dims)

    return save


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    return folder
