# SPDX-License-Identifier: Apache-2.0
"""Builds in real processes: the product's own, and ones that misbehave."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from support import models
from support.killable import until
from support.open_files import open_files, opened_since
from thirdrail_engines.builds import BuildLimits, BuiltPlan, process_tree, run_build
from thirdrail_engines.plans import Builder, PlanRequest

MISBEHAVING = Path(__file__).with_name("misbehaving.py")

Misbehave = Callable[..., BuiltPlan]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(models.add(1), path)
    return path


@pytest.fixture
def request_for(source: Path) -> PlanRequest:
    return PlanRequest(source, Builder.ONNXRUNTIME, "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "build"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No test leaves a process behind, nor a descriptor."""
    processes, files = process_tree.members(os.getpid()), open_files()
    yield
    until(lambda: len(process_tree.members(os.getpid())) <= len(processes))
    until(lambda: opened_since(files) == [], lambda: opened_since(files))


@pytest.fixture
def misbehave(request_for: PlanRequest, folder: Path) -> Misbehave:
    """misbehave("what", limits): a build by a process that does that; see misbehaving.py."""

    def run(
        what: str,
        limits: BuildLimits | None = None,
        tell: Callable[[str, int, int], None] = lambda *_: None,
        cancelled: threading.Event | None = None,
    ) -> BuiltPlan:
        return run_build(
            request_for,
            folder,
            limits or BuildLimits(seconds_max=60),
            tell,
            cancelled or threading.Event(),
            command=[sys.executable, "-P", str(MISBEHAVING), what],
        )

    return run
