# SPDX-License-Identifier: Apache-2.0
"""Proofs give way: they run, with all that they start, on threads of the lowest priority."""

import os
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest

from support.compilations import Services
from support.perceptrons import two_layers
from thirdrail_engines import EngineOptions, Inspector, load, one_engine
from thirdrail_engines.background import NICENESS, in_background
from thirdrail_engines.compile_options import read_compile_options
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.reference_proof import ReferenceProof, prove


def niceness() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_work_and_the_threads_that_it_starts_have_the_lowest_priority() -> None:
    before, seen = niceness(), []

    def work() -> str:
        seen.append(niceness())
        thread = threading.Thread(target=lambda: seen.append(niceness()))
        thread.start()
        thread.join()
        return "done"

    assert in_background(work) == "done"
    assert seen == [NICENESS, NICENESS]
    assert niceness() == before


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0)


def test_a_proof_is_made_in_the_background(
    cache: PlanCache, inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "model.onnx", []
    onnx.save(two_layers(), path)

    def watched(*arguments: Any, **more: Any) -> ReferenceProof:
        seen.append(niceness())
        return prove(*arguments, **more)

    monkeypatch.setattr(one_engine, "prove", watched)
    loaded = load(
        path,
        options=EngineOptions(),
        inspector=inspector,
        compile=read_compile_options({"keep_optimised": "true"}),
        services=Services(cache).given,
    )
    loaded.engine.close()
    assert loaded.report.proof is not None
    assert seen == [NICENESS]
