# SPDX-License-Identifier: Apache-2.0
"""Plans that TensorRT for RTX builds here, without a GPU. None is run."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.plan_models import PlanModel
from thirdrail_engines.builds import BuildLimits, run_build
from thirdrail_engines.builds.result import Built, PlanTensor
from thirdrail_engines.plans import Builder, PlanRequest, Profile, ShapeRange
from thirdrail_engines.tensorrt import (
    describe_plan,
    installed_builders,
    read_header,
)

pytestmark = pytest.mark.needs_tensorrt

Build = Callable[..., Built]
Models = dict[str, PlanModel]

CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def rows(smallest: int, best: int, largest: int) -> Profile:
    return Profile({"x": ShapeRange((smallest, 64), (best, 64), (largest, 64))})


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        (name, capability)
        for name in ("magika", "ocr_detection", "ocr_recognition", "silero_vad_ifless")
        for capability in CAPABILITIES
        # Of these only convolutions go without the fp32 matrix products that Turing is refused.
        if capability != "sm75" or name == "ocr_detection"
    ],
)
def test_real_models_for_each_capability(
    build: Build, models: Models, name: str, capability: str
) -> None:
    model = models[name]
    built = build(model.path, profiles=[model.profile], compute_capabilities=(capability,))
    header = read_header(built.plan.read_bytes())
    assert header is not None
    assert (header.builder, header.capabilities) == (Builder.TENSORRT_RTX, (capability,))
    assert header.version == dict(installed_builders())[Builder.TENSORRT_RTX]
    assert header.plan_bytes == built.plan.stat().st_size > 1 << 20
    assert {tensor.name for tensor in built.tensors if tensor.is_input} >= set(model.profile.inputs)


def test_a_plan_for_several_capabilities(build: Build, models: Models) -> None:
    model = models["magika"]
    built = build(model.path, profiles=[model.profile], compute_capabilities=("sm120", "sm86"))
    plan = built.plan.read_bytes()
    assert describe_plan(plan).startswith(
        f"built with TensorRT for RTX {dict(installed_builders())[Builder.TENSORRT_RTX]} "
        "for sm86, sm120; here: TensorRT for RTX "
    )


def test_what_is_told_of_a_plan(build: Build, models: Models) -> None:
    model = models["ocr_detection"]
    built = build(model.path, profiles=[model.profile])
    assert built.tensors == (
        PlanTensor("x", "FP32", (-1, 3, -1, -1), is_input=True),
        PlanTensor("fetch_name_0", "FP32", (-1, 1, -1, -1), is_input=False),
    )
    assert built.source_layers["convolution"] == 83
    assert built.layers == {}
    assert any("Empty initializer" in warning for warning in built.warnings)


def test_weights_beside_the_file(build: Build, sum_path: Path) -> None:
    assert build(sum_path, profiles=[rows(1, 2, 4)]).plan.exists()


def test_several_profiles_and_options(build: Build, sum_path: Path) -> None:
    options = {"workspace_bytes": 1 << 28, "optimization_level": 5, "threads_max": 2}
    assert build(sum_path, profiles=[rows(1, 1, 1), rows(2, 4, 8)], **options).plan.exists()


def test_progress_is_told(build: Build, sum_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(sum_path, lambda *progress: told.append(progress), profiles=[rows(1, 2, 4)])
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases[0] == "reading the graph"
    assert phases[-1] == "writing the plan"
    assert len(phases) > 4
    assert all(0 <= done <= steps for _, done, steps in told)
    assert any(done == steps > 1 for _, done, steps in told)


def test_who_is_told_can_stop_it(build: Build, models: Models, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    told = 0

    def tell(phase: str, done: int, steps: int) -> None:
        nonlocal told
        told += 1
        if done == 3:
            raise EnoughError

    model = models["ocr_detection"]
    with pytest.raises(EnoughError):
        build(model.path, tell, profiles=[model.profile])
    assert told < 10
    assert list((tmp_path / "build").iterdir()) == []


def test_in_a_process_of_its_own(
    models: Models, request_for: Callable[..., PlanRequest], tmp_path: Path
) -> None:
    model = models["magika"]
    request = request_for(model.path, profiles=(model.profile,))
    told: list[str] = []
    built = run_build(
        request,
        tmp_path,
        BuildLimits(seconds_max=110, niceness=1),
        lambda phase, done, steps: told.append(phase),
        threading.Event(),
    )
    assert read_header(built.plan.read_bytes()) is not None
    assert "writing the plan" in told
    assert 50 << 20 < built.peak_memory_bytes < 1 << 30
