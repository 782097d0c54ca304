# SPDX-License-Identifier: Apache-2.0
"""PyTorch models as files. torch is imported by those tests only that are marked needs_torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SaveModel = Callable[..., Path]


@pytest.fixture
def save_exported(tmp_path: Path) -> SaveModel:
    """save_exported(module, examples, open_dims, named) -> the path of its .pt2."""

    def save(module: Any, *arguments: Any) -> Path:
        from support import torch_modules

        return torch_modules.save_exported(tmp_path / "model.pt2", module, *arguments)

    return save


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    return folder
