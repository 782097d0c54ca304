# SPDX-License-Identifier: Apache-2.0
"""What becomes of a load whose first engine cannot be had, or is not proven."""

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from compiling.conftest import FAIL, LOADING, PLAN, LoadModel, results
from support.compilations import GIB, Services
from support.models import double
from support.perceptrons import two_layers, with_outputs_swapped, with_weight
from thirdrail_engines import EngineOptions, Inspector, ModelFileError, load
from thirdrail_engines.builds import run_build
from thirdrail_engines.compile_options import CompileOptions, read_compile_options
from thirdrail_engines.compiling import CompileServices
from thirdrail_engines.engine_report import Attempt
from thirdrail_engines.load import NoEngine
from thirdrail_engines.onnxruntime_engine import OnnxRuntimeEngine
from thirdrail_engines.plan_cache import Manifest, PlanCache, key_of
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_engines.plans import BuildError, BuildFault, Precision
from thirdrail_engines.profiles import ProfileError
from thirdrail_engines.proving import ProofError


def put_damaged(cache: PlanCache, model: Path, damaged: onnx.ModelProto) -> None:
    """Into the cache, under the key of the model: the plan of another, whole and sound by all
    checksums."""
    other = model.with_name("damaged.onnx")
    onnx.save(damaged, other)
    services = CompileServices(cache)
    wanted = CompileOptions()
    requests = [
        onnxruntime_request(path, wanted, precision=Precision.AS_IS, threads_max=1)
        for path in (model, other)
    ]
    with cache.workspace() as folder:
        built = run_build(requests[1], folder, services.limits, services.tell, services.cancelled)
        cache.put(key_of(requests[0]), built.plan, Manifest())
    cache.release(key_of(requests[0]))
    other.unlink()


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        (with_weight(two_layers(), "b", (3, 2), 9.0), "output 'y' has max_rel"),
        (with_outputs_swapped(two_layers()), "output 'z' has cosine"),
        (with_weight(two_layers(), "c", (0, 0), np.nan), "elements that are NaN or infinite"),
    ],
    ids=["a weight", "swapped outputs", "a NaN"],
)
def test_a_damaged_plan_is_not_served(
    load_model: LoadModel,
    cache: PlanCache,
    model: Path,
    caplog: pytest.LogCaptureFixture,
    damaged: onnx.ModelProto,
    expected: str,
) -> None:
    put_damaged(cache, model, damaged)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(model, PLAN)
    assert loaded.report.engine == "onnxruntime"
    (attempt,) = loaded.report.attempts
    assert (attempt.engine, attempt.fault) == ("onnxruntime plan", "not proven")
    assert expected in attempt.reason
    assert loaded.report.why_not_first.startswith("onnxruntime plan: not proven: output ")
    assert "onnxruntime plan cannot be used" in caplog.text
    assert results(loaded) == results(load_model(model, {}))
    with pytest.raises(ProofError, match=expected) as caught:
        load_model(model, {**PLAN, **FAIL})
    assert not caught.value.proof.is_proven


def test_wider_bounds_are_taken_without_another_run(
    load_model: LoadModel, cache: PlanCache, model: Path
) -> None:
    put_damaged(cache, model, with_weight(two_layers(), "b", (3, 2), 2.0))
    assert load_model(model, PLAN).report.engine == "onnxruntime"
    services = Services(cache)
    wide = {"tolerance.max_abs": "1000", "tolerance.cosine": "0", "tolerance.equal": "0"}
    assert load_model(model, {**PLAN, **wide}, services).report.engine == "onnxruntime plan"
    assert services.phases == [LOADING]


def test_an_engine_that_is_not_here_is_named(load_model: LoadModel, model: Path) -> None:
    loaded = load_model(model, {"engine": "tensorrt_rtx"})
    assert loaded.report.engine == "onnxruntime"
    (attempt,) = loaded.report.attempts
    assert (attempt.engine, attempt.fault) == ("tensorrt_rtx on cuda", "missing")
    assert attempt.reason.startswith("tensorrt_rtx needs a GPU: there is no CUDA device here")
    assert loaded.report.why_not_first == f"tensorrt_rtx on cuda: missing: {attempt.reason}"
    with pytest.raises(BuildError) as caught:
        load_model(model, {"engine": "tensorrt_rtx", **FAIL})
    assert caught.value.fault is BuildFault.MISSING


def test_what_the_builder_refuses_is_told_and_the_next_runs_it(
    load_model: LoadModel, model: Path
) -> None:
    """ONNX Runtime has no BF16 kernels for matrices on the CPU."""
    loaded = load_model(model, {"precision": "bf16"})
    assert loaded.report.engine == "onnxruntime"
    assert "Could not find an implementation for MatMul" in loaded.report.why_not_first
    assert results(loaded) == results(load_model(model, {}))


def test_a_configuration_that_contradicts_the_model_is_refused_by_every_engine(
    load_model: LoadModel, model: Path
) -> None:
    unknown = {"proof.z": "1"}
    for engine in ({}, PLAN):
        with pytest.raises(ProfileError, match=r"proof.z: the model has no such input, only 'x'"):
            load_model(model, {**unknown, **engine})
    wrong = {"profile.0.x": "1x15,2x15,3x15"}
    for engine in ({}, PLAN, {"engine": "tensorrt_rtx"}):
        with pytest.raises(ProfileError, match=r"profile.0.x has the size 15 on axis 1"):
            load_model(model, {**wrong, **engine})


def test_a_cancelled_load_falls_back_to_nothing(
    load_model: LoadModel, cache: PlanCache, model: Path
) -> None:
    services = Services(cache, reading=lambda: services.cancelled.set())
    with pytest.raises(BuildError) as caught:
        load_model(model, PLAN, services)
    assert caught.value.fault is BuildFault.CANCELLED


def test_a_cancelled_load_looks_for_no_other_engine(
    load_model: LoadModel, cache: PlanCache, model: Path
) -> None:
    services = Services(cache)
    services.cancelled.set()
    with pytest.raises(BuildError) as caught:
        load_model(model, {"engine": "tensorrt_rtx"}, services)
    assert caught.value.fault is BuildFault.CANCELLED


@pytest.mark.slow
def test_a_loaded_plan_makes_room_for_others(
    inspector: Inspector, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def load_in(cache: PlanCache) -> str:
        loaded = load(
            model,
            options=EngineOptions(),
            inspector=inspector,
            compile=read_compile_options(PLAN),
            services=Services(cache).given,
        )
        loaded.engine.close()
        return loaded.report.plan_key

    folder = tmp_path / "small"
    with PlanCache(folder, GIB) as cache:
        load_in(cache)
    used = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    with PlanCache(folder, used + used // 2) as cache, caplog.at_level(logging.WARNING):
        load_in(cache)
        onnx.save(two_layers(seed=1), model)
        second = load_in(cache)
        (kept,) = (folder / "plans").iterdir()
    assert kept.name == second
    assert caplog.text == ""


def test_a_file_that_no_engine_reads_has_each_reason(load_model: LoadModel, model: Path) -> None:
    model.write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"^model.onnx: not a readable ONNX file"):
        load_model(model, {})
    with pytest.raises(NoEngine, match=r"^model.onnx is run by no engine: ") as caught:
        load_model(model, PLAN)
    assert [each.engine for each in caught.value.attempts] == ["onnxruntime plan", "onnxruntime"]


def test_a_reason_that_two_engines_share_is_said_once() -> None:
    attempts = [Attempt(name, "refused", "no kernel") for name in ("one", "two")]
    said = str(NoEngine(Path("model.onnx"), [*attempts, Attempt("three", "missing", "no GPU")]))
    assert said == (
        "model.onnx is run by no engine: one: refused, two: refused: no kernel; three: missing: "
        "no GPU"
    )


@pytest.mark.parametrize("name", ["model.plan", "model.engine"])
def test_a_bare_plan_needs_a_gpu_and_says_what_built_it(
    load_model: LoadModel, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with pytest.raises(ModelFileError, match=f"^{name} cannot be read: no such file"):
        load_model(path, {})
    path.write_bytes(b"ptrt" + bytes(100))
    with pytest.raises(ModelFileError, match=f"^{name}: .*here: "):
        load_model(path, {})


@pytest.mark.slow
def test_engines_are_closed_on_every_way_out(
    load_model: LoadModel,
    cache: PlanCache,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the reference of a proof, and the engine that was not proven."""
    open_engines: set[OnnxRuntimeEngine] = set()
    opened, close = OnnxRuntimeEngine.__init__, OnnxRuntimeEngine.close

    def remember(self: OnnxRuntimeEngine, *arguments: object) -> None:
        opened(self, *arguments)  # type: ignore[arg-type]
        open_engines.add(self)

    def forget(self: OnnxRuntimeEngine) -> None:
        close(self)
        open_engines.discard(self)

    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", remember)
    monkeypatch.setattr(OnnxRuntimeEngine, "close", forget)
    kept = [load_model(model, PLAN).engine]
    put_damaged(cache, model, double())
    kept.append(load_model(model, PLAN).engine)
    with pytest.raises(ProofError):
        load_model(model, {**PLAN, **FAIL})
    assert open_engines == set(kept)


def test_pytorch_is_no_reference_for_an_onnx_file(load_model: LoadModel, model: Path) -> None:
    """Whatever the engines and the policy."""
    for parameters in ({}, PLAN):
        with pytest.raises(ProfileError, match=r"is torch, which does not run model\.onnx: it"):
            load_model(model, {**parameters, "proof_reference": "torch"})
