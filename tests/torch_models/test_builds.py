# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files through the build process to plans, and through `load` to engines."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from thirdrail_engines import EngineOptions, load
from thirdrail_engines.builds import BuildLimits, BuiltPlan, run_build
from thirdrail_engines.compile_options import CompileOptions, EngineChoice
from thirdrail_engines.onnxruntime_engine import load_plan
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Precision,
    Profile,
    ShapeRange,
)
from thirdrail_engines.tensorrt import installed_builders

pytestmark = [pytest.mark.needs_torch, pytest.mark.timeout(300)]

SaveModel = Callable[..., Path]
IMAGES = ShapeRange((1, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32))
PROFILE = Profile({"image": IMAGES})


def build(source: Path, builder: Builder = Builder.ONNXRUNTIME, **request: Any) -> BuiltPlan:
    folder = source.parent / "build"
    folder.mkdir()
    version = dict(installed_builders()).get(builder, ort.__version__)
    wanted = PlanRequest(source, builder, version, **request)
    return run_build(wanted, folder, BuildLimits(), lambda *_: None, threading.Event())


@pytest.fixture
def convolutions(save_exported: SaveModel) -> Path:
    import torch

    from support.torch_modules import Convolutions

    return save_exported(Convolutions(), (torch.randn(2, 3, 32, 32),), ({0: "batch"},))


def answer_of(engine: Any, image: Any) -> Any:
    return engine.run({"image": image}, ["output"], {})["output"]


def by_torch(source: Path, image: Any) -> Any:
    from thirdrail_engines.torch_engine import load_torch

    return answer_of(load_torch(source, options=EngineOptions()), image)


@pytest.fixture
def image() -> Any:
    return np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)


def test_a_program_becomes_a_plan_of_onnxruntime(convolutions: Path, image: Any) -> None:
    built = build(convolutions)
    assert [(tensor.name, tensor.shape) for tensor in built.tensors] == [
        ("image", (-1, 3, 32, 32)),
        ("output", (-1, 5)),
    ]
    assert built.conversion is None
    engine = load_plan(built.plan.read_bytes(), convolutions, options=EngineOptions())
    np.testing.assert_allclose(answer_of(engine, image), by_torch(convolutions, image), atol=1e-5)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16], ids=str)
@pytest.mark.needs_tensorrt
def test_a_program_becomes_a_plan_for_a_gpu(convolutions: Path, precision: Precision) -> None:
    """Built here; it runs on GPUs only."""
    built = build(
        convolutions,
        Builder.TENSORRT_RTX,
        precision=precision,
        profiles=(PROFILE,),
        compute_capabilities=("sm86",),
    )
    assert built.plan.stat().st_size > 1000
    assert [tensor.name for tensor in built.tensors] == ["image", "output"]
    assert {tensor.dtype for tensor in built.tensors} == {"FP32"}
    conversion: Any = built.conversion
    assert conversion["precision"] == str(precision)
    assert conversion["measured_with"] == [f"image=2x3x32x32 seed={seed}" for seed in range(3)]
    assert 0 < conversion["outputs"][0]["max_abs"] < 2e-2


@pytest.mark.needs_tensorrt
def test_an_lstm_becomes_a_plan_for_a_gpu(save_exported: SaveModel) -> None:
    import torch

    from support.torch_modules import Recurrent

    batch = {0: "batch"}
    examples = (torch.randn(2, 5, 4), torch.randn(2, 4, 6), torch.randn(2, 4, 6))
    source = save_exported(Recurrent(), examples, (batch, batch, batch))
    inputs = {"x": (5, 4), "state": (4, 6), "cell": (4, 6)}
    profile = Profile(
        {n: ShapeRange((1, *rest), (2, *rest), (8, *rest)) for n, rest in inputs.items()}
    )
    built = build(
        source, Builder.TENSORRT_RTX, profiles=(profile,), compute_capabilities=("sm86", "sm120")
    )
    assert built.plan.stat().st_size > 1000
    assert {tensor.name for tensor in built.tensors} == {
        *inputs, "output_0", "output_1", "output_2",
    }  # fmt: skip


def test_torchscript_becomes_a_plan(tmp_path: Path, image: Any) -> None:
    import torch

    from support.torch_modules import Convolutions, save_script

    module = Convolutions()
    source = save_script(tmp_path / "model.pt", module)
    built = build(source, profiles=(PROFILE,))
    engine = load_plan(built.plan.read_bytes(), source, options=EngineOptions())
    expected = module(torch.from_numpy(image)).detach().numpy()
    np.testing.assert_allclose(answer_of(engine, image), expected, atol=1e-5)


def test_what_is_wrong_with_a_file_comes_back_in_words(convolutions: Path) -> None:
    whole = convolutions.read_bytes()
    convolutions.write_bytes(whole[:-200])
    with pytest.raises(BuildError) as caught:
        build(convolutions)
    assert caught.value.fault is BuildFault.REFUSED
    assert str(caught.value).endswith(
        "model.pt2: cut short or damaged: its table of contents is missing"
    )


def test_a_program_is_loaded_as_onnx_or_on_torch_itself(convolutions: Path, image: Any) -> None:
    expected = by_torch(convolutions, image)
    for choice, name in ((EngineChoice.AUTO, "onnxruntime"), (EngineChoice.TORCH, "torch")):
        loaded = load(convolutions, options=EngineOptions(), compile=CompileOptions(engine=choice))
        assert loaded.report.engine.startswith(name)
        np.testing.assert_allclose(answer_of(loaded.engine, image), expected, atol=1e-5)
        loaded.engine.close()


def test_what_onnx_has_no_word_for_is_served_by_torch(save_exported: SaveModel) -> None:
    import torch

    from support.torch_modules import Special

    source = save_exported(Special(), (torch.ones(3),))
    loaded = load(source, options=EngineOptions())
    assert loaded.report.engine.startswith("torch")
    assert "bessel_j0" in str(loaded.report)
    x = np.zeros(3, np.float32)
    assert loaded.engine.run({"x": x}, ["output"], {})["output"].tolist() == [1, 1, 1]
    loaded.engine.close()
