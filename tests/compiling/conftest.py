# SPDX-License-Identifier: Apache-2.0
"""Models to compile, and the engines that run them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from support.compilations import GIB, Services
from support.perceptrons import two_layers
from thirdrail_engines import Engine, EngineOptions, Inspector, LoadedEngine, load
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.onnxruntime_engine import load_onnx
from thirdrail_engines.plan_cache import PlanCache

LoadModel = Callable[..., LoadedEngine]
PLAN = {"keep_optimised": "true"}
FAIL = {"on_compile_failure": "fail"}
PROVING, LOADING = "proving the engine", "loading the engine"

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


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[PlanCache]:
    with PlanCache(tmp_path / "cache", GIB) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/model.onnx"
    onnx.save(two_layers(), path)
    return path


@pytest.fixture
def load_model(inspector: Inspector, cache: PlanCache) -> Iterator[LoadModel]:
    """load_model(path, parameters, services=None): closed after the test."""
    loaded: list[LoadedEngine] = []

    def load_one(
        path: Path, parameters: dict[str, str], services: Services | None = None
    ) -> LoadedEngine:
        loaded.append(
            load(
                path,
                options=EngineOptions(),
                inspector=inspector,
                compile=read_compile_options(parameters),
                services=(services or Services(cache)).given,
            )
        )
        return loaded[-1]

    yield load_one
    for each in loaded:
        each.engine.close()


def results(loaded: LoadedEngine, rows: int = 3) -> dict[str, list[object]]:
    x = np.arange(rows * 16, dtype=np.float32).reshape(rows, 16)
    return {name: y.tolist() for name, y in loaded.engine.run({"x": x}, ["y", "z"], {}).items()}
