# SPDX-License-Identifier: Apache-2.0
"""PyTorch sources, and plans for GPUs that are not here."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from support.compilations import Services
from support.perceptrons import two_layers
from thirdrail.dtypes import BY_NAME
from thirdrail.tensors import TensorSpec
from thirdrail_engines import EngineOptions, Inspector, LoadedEngine, cuda_engines, load, one_engine
from thirdrail_engines.ahead import PlanAhead, compile_ahead
from thirdrail_engines.compile_options import CompileOptions, read_compile_options
from thirdrail_engines.cuda.identity import DeviceFacts
from thirdrail_engines.inputs_on_record import inputs_on_record
from thirdrail_engines.load import NoEngine
from thirdrail_engines.one_engine import EngineLoader
from thirdrail_engines.onnxruntime_engine import OnnxRuntimeEngine, load_onnx
from thirdrail_engines.plan_cache import PlanCache, key_of
from thirdrail_engines.plans import Builder, BuildError, BuildFault, PlanRequest

ROWS = {"profile.0.x": "1x16,4x16,8x16"}
AMPERE = DeviceFacts("GPU-0", "NVIDIA A10", (8, 6), 24 << 30, (13, 0))


def test_a_manifest_tells_the_inputs_of_its_model(
    cache: PlanCache, model: Path, tmp_path: Path
) -> None:
    assert inputs_on_record(model, Builder.ONNXRUNTIME, cache) is None
    (plan,) = ahead(model, cache, Builder.ONNXRUNTIME)
    assert inputs_on_record(model, Builder.ONNXRUNTIME, cache) == (
        TensorSpec("x", BY_NAME["FP32"], (-1, 16)),
    )
    assert inputs_on_record(model, Builder.TENSORRT_RTX, cache) is None
    assert inputs_on_record(model, Builder.ONNXRUNTIME, None) is None
    manifest = tmp_path / "cache/plans" / plan.key / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"FP32"', '"FP31"'))
    assert inputs_on_record(model, Builder.ONNXRUNTIME, cache) is None
    manifest.write_text(text)
    onnx.save(two_layers(seed=1), model)
    assert inputs_on_record(model, Builder.ONNXRUNTIME, cache) is None


def ahead(
    path: Path, cache: PlanCache, builder: Builder, *capabilities: str, **parameters: str
) -> list[PlanAhead]:
    plans = compile_ahead(
        path,
        builder,
        capabilities,
        options=EngineOptions(),
        compile=read_compile_options({**ROWS, **parameters}),
        services=Services(cache).given,
    )
    return list(plans)


def test_a_plan_for_this_cpu_is_found_when_the_model_is_loaded(
    cache: PlanCache, model: Path, inspector: Inspector
) -> None:
    (plan,) = ahead(model, cache, Builder.ONNXRUNTIME)
    (again,) = ahead(model, cache, Builder.ONNXRUNTIME)
    assert (plan.is_cache_hit, again.is_cache_hit) == (False, True)
    assert plan.manifest.build_s > 0
    loaded = load(
        model,
        options=EngineOptions(),
        inspector=inspector,
        compile=CompileOptions(keeps_optimised=True),
        services=Services(cache).given,
    )
    loaded.engine.close()
    assert loaded.report.is_cache_hit
    assert loaded.report.plan_key == plan.key


@pytest.mark.needs_tensorrt
def test_a_plan_for_a_gpu_is_found_where_that_gpu_is(
    cache: PlanCache, model: Path, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = ahead(model, cache, Builder.TENSORRT_RTX, "sm86", "8.9")
    assert [(each.capability, each.is_cache_hit) for each in plans] == [
        ("sm86", False),
        ("8.9", False),
    ]
    monkeypatch.setattr(cuda_engines, "cuda_devices", lambda: (AMPERE,))
    wanted = read_compile_options(ROWS)
    with EngineLoader(model, EngineOptions(), inspector, wanted, None) as loader:
        assert key_of(loader.request(Builder.TENSORRT_RTX)).digest == plans[0].key


@pytest.mark.needs_tensorrt
def test_a_plan_that_is_there_is_found_without_loading_the_model(
    cache: PlanCache, model: Path, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest tells the shapes."""
    (plan,) = ahead(model, cache, Builder.TENSORRT_RTX, "sm86")
    monkeypatch.setattr(cuda_engines, "cuda_devices", lambda: (AMPERE,))
    loads: list[Path] = []

    def load_and_note(path: Path, **more: Any) -> OnnxRuntimeEngine:
        loads.append(path)
        return load_onnx(path, **more)

    monkeypatch.setattr(one_engine, "load_onnx", load_and_note)

    def request(**parameters: str) -> PlanRequest:
        wanted = read_compile_options({**ROWS, **parameters})
        services = Services(cache).given
        with EngineLoader(model, EngineOptions(), inspector, wanted, services) as loader:
            return loader.request(Builder.TENSORRT_RTX)

    assert key_of(request()).digest == plan.key
    assert loads == []
    assert key_of(request(workspace_mib="64")).digest != plan.key
    assert loads == [model], "no such plan is there"


@pytest.mark.needs_tensorrt
def test_one_plan_for_several_gpus(cache: PlanCache, model: Path) -> None:
    both = ahead(model, cache, Builder.TENSORRT_RTX, "sm120", compute_capabilities="sm86,sm89")
    assert [each.capability for each in both] == [""]
    with pytest.raises(BuildError, match="sm90"):
        ahead(model, cache, Builder.TENSORRT_RTX, "sm90")


@pytest.mark.needs_tensorrt
def test_a_bare_plan_that_cannot_run_says_what_built_it(
    cache: PlanCache, model: Path, tmp_path: Path
) -> None:
    (built,) = ahead(model, cache, Builder.TENSORRT_RTX, "sm86")
    path = tmp_path / "model.plan"
    path.write_bytes((tmp_path / "cache/plans" / built.key / "plan").read_bytes())
    with pytest.raises(BuildError) as caught:
        load(path, options=EngineOptions())
    assert caught.value.fault is BuildFault.MISSING
    said = str(caught.value)
    assert said.startswith("model.plan: tensorrt_rtx needs a GPU: there is no CUDA device here")
    assert "built with TensorRT for RTX" in said
    assert "here: " in said


# PyTorch


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    import torch

    from support.torch_modules import TwoInTwoOut, save_exported

    examples = (torch.ones(2, 8), torch.ones(2, 1))
    rows = {0: "n"}
    (tmp_path / "exported").mkdir()
    return save_exported(tmp_path / "exported/model.pt2", TwoInTwoOut(), examples, (rows, rows))


def loaded_from(path: Path, cache: PlanCache | None, **parameters: str) -> LoadedEngine:
    return load(
        path,
        options=EngineOptions(),
        compile=read_compile_options(parameters),
        services=Services(cache).given,
    )


def total(loaded: LoadedEngine) -> list[float]:
    random = np.random.default_rng(0)
    words = random.standard_normal((3, 8), dtype=np.float32)
    inputs = {"words": words, "mask": np.ones((3, 1), np.float32)}
    result = loaded.engine.run(inputs, ["total"], {})["total"]
    loaded.engine.close()
    return [float(each) for each in result]


@pytest.mark.needs_torch
def test_an_exported_program_runs_as_a_plan_of_onnx_runtime(
    cache: PlanCache, exported: Path
) -> None:
    first, second = loaded_from(exported, cache), loaded_from(exported, cache)
    assert first.report.engine == "onnxruntime plan"
    assert (first.report.is_cache_hit, second.report.is_cache_hit) == (False, True)
    assert first.report.proof is None  # it is the reference for others
    by_torch = loaded_from(exported, cache, engine="torch")
    assert by_torch.report.engine == "torch"
    assert total(first) == total(second) == pytest.approx(total(by_torch), rel=1e-5)


@pytest.mark.needs_torch
def test_an_exported_program_in_another_precision_is_proven(
    cache: PlanCache, exported: Path
) -> None:
    loaded = loaded_from(exported, cache, precision="fp16")
    assert loaded.report.engine == "onnxruntime plan"
    assert loaded.report.proof is not None
    assert 0 < loaded.report.proof.outputs[0].max_rel < 5e-2
    loaded.engine.close()


@pytest.mark.needs_torch
def test_a_file_that_is_no_program_has_the_reason_of_each(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no archive")
    expected = r"no engine: onnxruntime plan: refused, torch: refused: model\.pt2: not a file of"
    with pytest.raises(NoEngine, match=expected) as caught:
        loaded_from(path, None)
    assert len(caught.value.attempts) == 2
