# SPDX-License-Identifier: Apache-2.0
"""Models to compile, and the engines that run them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from thirdrail_engines import Engine, EngineOptions, Inspector
from thirdrail_engines.onnxruntime_engine import load_onnx

OpenModel = Callable[[onnx.ModelProto], Engine]


@pytest.fixture(scope="session")
def inspector() -> Iterator[Inspector]:
    with Inspector() as shared:
        yield shared


@pytest.fixture
def open_model(tmp_path: Path, inspector: Inspector) -> Iterator[OpenModel]:
    """A model on ONNX Runtime, as it is in its file."""
    engines: list[Engine] = []

    def open_one(built: onnx.ModelProto) -> Engine:
        path = tmp_path / f"open{len(engines)}.onnx"
        onnx.save(built, path)
        engines.append(load_onnx(path, options=EngineOptions(), inspector=inspector))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()
