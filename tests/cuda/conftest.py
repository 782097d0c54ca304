# SPDX-License-Identifier: Apache-2.0
"""Devices and engines on them, for tests without a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.conftest import WriteModel, build_model_fixture, identity, inspector, write_model
from support.twin_runs import FLOAT, INT64, Node
from support.twins import twin_engine
from thirdrail_engines import Engine, Inspector
from thirdrail_engines.cuda.engine import CudaEngine
from thirdrail_engines.cuda.twin import TwinDevice

__all__ = ["build_model_fixture", "identity", "inspector", "write_model"]

LoadModel = Callable[..., Engine]


@pytest.fixture
def device() -> Iterator[TwinDevice]:
    twin = TwinDevice()
    yield twin
    twin.close()  # says what was not given back


@pytest.fixture
def load_model(device: TwinDevice, inspector: Inspector) -> Iterator[Callable[..., CudaEngine]]:
    """Load a file on the twin: load_model(path, profiles=..., **options)."""
    engines: list[CudaEngine] = []

    def load_one(path: Path, threads_max: int = 1, **more: Any) -> CudaEngine:
        engines.append(twin_engine(path, device, inspector, **more))
        return engines[-1]

    yield load_one
    for engine in engines:
        engine.close()


@pytest.fixture
def double(write_model: WriteModel) -> Path:
    return write_model(
        [Node("Add", ["x", "x"], ["y"])],
        {"x": (FLOAT, ["n"])},
        {"y": (FLOAT, ["n"])},
    )


@pytest.fixture
def nonzero(write_model: WriteModel) -> Path:
    """The size of y depends on the values of x; that of same does not."""
    return write_model(
        [Node("NonZero", ["x"], ["y"]), Node("Neg", ["x"], ["minus"])],
        {"x": (FLOAT, ["n"])},
        {"y": (INT64, [1, "k"]), "minus": (FLOAT, ["n"])},
    )


@pytest.fixture
def gather(write_model: WriteModel) -> Path:
    """An index out of bounds is to the twin what an illegal access is to a GPU."""
    return write_model(
        [Node("Gather", ["x", "index"], ["y"])],
        {"x": (FLOAT, ["n"]), "index": (INT64, ["k"])},
        {"y": (FLOAT, ["k"])},
    )
