# SPDX-License-Identifier: Apache-2.0
"""The reference of a proof is another process: what becomes of it, and of the engine then."""

import contextlib
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from builds.conftest import MISBEHAVING
from compiling.conftest import FAIL, LOADING, PLAN, PROVING, LoadModel, OpenModel
from support.compilations import Services
from support.models import gather
from support.perceptrons import two_layers, with_rounded_weights
from thirdrail_engines import proof_apart
from thirdrail_engines.builds import BuildLimits, run_reference
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.expectations import ReferenceRequest
from thirdrail_engines.onnxruntime_engine import OnnxRuntimeEngine
from thirdrail_engines.plan_cache import PlanCache
from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.proving import ProofError
from thirdrail_engines.reference_proof import Tolerance, prove
from thirdrail_engines.trials import ValueRange

# The plan is in the cache then, and its proof is not: it is of other inputs.
ANEW = {**PLAN, "proof.x": "0..1"}
PROGRAMS = ("builds/child.py", MISBEHAVING.name)


def limited(cache: PlanCache, **limits: Any) -> Services:
    services = Services(cache)
    services.given = dataclasses.replace(services.given, limits=BuildLimits(**limits))
    return services


def children() -> list[str]:
    """What this process computes references with. (Others read graphs, and come and go.)"""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [word for word in child.cmdline() if word.endswith(PROGRAMS)]
    return found


def left_in(cache: Path) -> list[Path]:
    return [*(cache / "work").iterdir()]


def test_the_loading_process_opens_no_reference(
    load_model: LoadModel, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, made = OnnxRuntimeEngine.__init__, []

    def count(self: OnnxRuntimeEngine, *arguments: Any) -> None:
        made.append(self)
        opened(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", count)
    loaded = load_model(model, PLAN)
    assert loaded.report.proof is not None
    assert loaded.report.proof.runs == ("trial sizes", "trial sizes, one row")
    assert [output.compared for output in loaded.report.proof.outputs] == [264, 264, 33]
    assert made == [loaded.engine]
    assert left_in(tmp_path / "cache") == []


def test_profiles_arrive(load_model: LoadModel, model: Path) -> None:
    loaded = load_model(model, {**PLAN, "profile.0.x": "1x16,2x16,3x16"})
    assert loaded.report.proof is not None
    assert loaded.report.proof.runs == (
        "profile 0 best",
        "profile 0 smallest",
        "profile 0 largest",
    )
    assert loaded.report.proof.outputs[0].compared == (1 + 2 + 3) * 8


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"seconds_max": 0.001}, "the reference run took longer than 0.001 s"),
        ({"memory_bytes_max": 1 << 20}, "the reference run took .* MiB of memory, and may take 1"),
    ],
    ids=["time", "memory"],
)
def test_a_reference_beyond_its_limits_proves_nothing(
    load_model: LoadModel,
    cache: PlanCache,
    model: Path,
    tmp_path: Path,
    limits: dict[str, Any],
    expected: str,
) -> None:
    load_model(model, PLAN)
    loaded = load_model(model, ANEW, limited(cache, **limits))
    assert loaded.report.engine == "onnxruntime"
    (attempt,) = loaded.report.attempts
    assert (attempt.engine, attempt.fault) == ("onnxruntime plan", "not proven")
    assert attempt.reason.startswith("there is no reference to compare with: the reference run ")
    with pytest.raises(ProofError, match=expected):
        load_model(model, {**ANEW, **FAIL}, limited(cache, **limits))
    assert children() == []
    assert left_in(tmp_path / "cache") == []
    # It is on no record: with time and memory the engine is proven.
    assert load_model(model, ANEW).report.engine == "onnxruntime plan"


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("segfault", "the process of the reference run was ended by SIGSEGV without a result"),
        ("well", "its process made no sense: it left a line that does not end"),
        ("plan_is_a_link", "no file, or empty"),
    ],
)
def test_a_reference_that_ends_badly_proves_nothing(
    load_model: LoadModel,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    expected: str,
) -> None:
    """Another program in the place of the real one: its models do not crash."""
    command = [sys.executable, "-P", str(MISBEHAVING), what]
    monkeypatch.setattr(proof_apart, "run_reference", partial(run_reference, command=command))
    with pytest.raises(ProofError, match=expected):
        load_model(model, {**PLAN, **FAIL})


def test_a_cancel_ends_the_reference(
    load_model: LoadModel,
    cache: PlanCache,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that would hang for ever."""
    command = [sys.executable, "-P", str(MISBEHAVING), "hang"]
    monkeypatch.setattr(proof_apart, "run_reference", partial(run_reference, command=command))
    services: Services = Services(cache, **{PROVING: lambda: services.cancelled.set()})
    with pytest.raises(BuildError, match=r"^the load of model.onnx was cancelled$") as caught:
        load_model(model, {**PLAN, **FAIL}, services)
    assert caught.value.fault is BuildFault.CANCELLED
    assert services.phases[-2:] == [LOADING, PROVING]
    assert children() == []
    assert left_in(tmp_path / "cache") == []


def test_without_a_cache_a_reference_is_computed_among_temporary_files(
    open_model: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = open_model(two_layers())
    request = ReferenceRequest(tmp_path / "open0.onnx", None, ())
    proof = proof_apart.prove_apart(engine, request, None, Tolerance(max_abs=0), CompileServices())
    assert proof.is_proven
    assert [*tmp_path.glob("*/*/*")] == []  # but empty folders of this user's builds


def test_a_proof_here_and_one_apart_are_the_same(
    open_model: OpenModel, tmp_path: Path, cache: PlanCache
) -> None:
    """Figure by figure, of an engine that is off by some."""
    engine, reference = open_model(with_rounded_weights(two_layers())), open_model(two_layers())
    request = ReferenceRequest(tmp_path / "open1.onnx", None, ())
    services = CompileServices(cache)
    apart = proof_apart.prove_apart(engine, request, None, Tolerance(max_abs=0), services)
    assert apart == prove(engine, reference, (), Tolerance(max_abs=0))
    assert not apart.is_proven


def test_values_arrive(open_model: OpenModel, tmp_path: Path) -> None:
    """No row of the table has such a number."""
    engine, path = open_model(gather()), tmp_path / "open0.onnx"
    request = ReferenceRequest(path, None, (), {"index": ValueRange(9, 9)})
    proof = proof_apart.prove_apart(engine, request, None, Tolerance(), CompileServices())
    assert "the reference refuses seeded inputs" in proof.faults[0]


def test_without_space_in_the_cache_a_proof_is_made_elsewhere(
    load_model: LoadModel,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A plan that lies in the cache must not be lost to a full disk."""
    load_model(model, PLAN)
    work = tmp_path / "cache" / "work"
    work.rmdir()
    work.write_bytes(b"")
    loaded = load_model(model, {**ANEW, **FAIL})
    assert loaded.report.engine == "onnxruntime plan"
    assert "model.onnx: it is proven without the cache: the plan cache" in caplog.text


@pytest.mark.slow
def test_a_reference_whose_disk_is_full_is_computed_elsewhere(
    load_model: LoadModel, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def run_or_fill(request: ReferenceRequest, folder: Path, *others: Any) -> Any:
        begun.append(folder)
        if len(begun) == 1:
            raise BuildError(BuildFault.OUT_OF_DISK, "no space left")
        return run_reference(request, folder, *others)

    monkeypatch.setattr(proof_apart, "run_reference", run_or_fill)
    assert load_model(model, PLAN).report.engine == "onnxruntime plan"
    assert begun[0].parent != begun[1].parent
