# SPDX-License-Identifier: Apache-2.0
"""What TensorRT for RTX does not build, in its own words and in ours."""

import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support.plan_models import PlanModel
from thirdrail_engines.builds import BuildLimits, BuiltPlan, run_build
from thirdrail_engines.builds.result import Built
from thirdrail_engines.plans import (
    Builder,
    BuildError,
    BuildFault,
    PlanRequest,
    Profile,
    ShapeRange,
)

pytestmark = pytest.mark.needs_tensorrt

Build = Callable[..., Built]
Models = dict[str, PlanModel]
WriteGraph = Callable[..., Path]

FLOAT = TensorProto.FLOAT
SQUARE = {"x": (FLOAT, [2, 3, 3])}
ROWS = Profile({"x": ShapeRange((1, 64), (2, 64), (4, 64))})


@pytest.fixture
def refusal(build: Build, tmp_path: Path) -> Callable[..., tuple[BuildFault, str]]:
    """Why a build failed, without the version of the package."""

    def build_and_fail(path: Path, **options: object) -> tuple[BuildFault, str]:
        with pytest.raises(BuildError) as caught:
            build(path, **options)
        text = str(caught.value)
        assert len(text) <= 2000
        assert "\n" not in text
        assert "_src/" not in text
        assert str(tmp_path) not in text
        return caught.value.fault, re.sub(r"RTX \d+(\.\d+)+", "RTX", text)

    return build_and_fail


Refuse = Callable[..., tuple[BuildFault, str]]


def test_dimensions_of_one_name(refusal: Refuse, models: Models) -> None:
    model = models["ocr_orientation"]
    assert refusal(model.path, profiles=[model.profile]) == (
        BuildFault.REFUSED,
        "model.onnx: TensorRT for RTX refused the model: Input dimensions with this name have "
        "different constant values or have contradictory IOptimizationProfile kMIN/kMAX "
        "constraints. The model gives dimensions 2 and 3 of 'x' the same name '?', so they have to "
        "be equal: name them apart, or give profiles in which they are equal",
    )


def test_the_same_model_with_a_profile_that_fits(build: Build, models: Models) -> None:
    shapes = ShapeRange((1, 3, 48, 48), (4, 3, 48, 48), (8, 3, 48, 48))
    built = build(models["ocr_orientation"].path, profiles=[Profile({"x": shapes})])
    assert built.plan.exists()


def test_conditional_parts(refusal: Refuse, models: Models) -> None:
    model = models["silero_vad_half"]
    assert refusal(model.path, profiles=[model.profile]) == (
        BuildFault.REFUSED,
        "model.onnx: TensorRT for RTX refused the model: Assertion tScope.getType() != "
        "ScopeType::kUNDEFINED failed. The model has conditional parts (If node '/decoder/If', "
        "If node '/decoder/If_1', If node '/If'): an export without If nodes, or with simpler "
        "ones, may be taken",
    )
    fault, text = refusal(models["silero_vad"].path, profiles=[models["silero_vad"].profile])
    assert fault is BuildFault.REFUSED
    assert "(If node 'If_0')" in text


def test_fp32_on_turing(refusal: Refuse, models: Models) -> None:
    model = models["magika"]
    fault, text = refusal(
        model.path, profiles=[model.profile], compute_capabilities=("sm75", "sm86")
    )
    assert fault is BuildFault.REFUSED
    assert "Einsum' for Turing (SM75): FP32 GEMM is not supported" in text
    assert text.endswith("Convert the model to fp16, or leave sm75 out")


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (
            helper.make_node("Nope", ["x"], ["y"], domain="own", name="strange"),
            "Nope node 'strange': Plugin not found, are the plugin name, version, and namespace "
            "correct?",
        ),
        (helper.make_node("Det", ["x"], ["y"], name="det"), "Det node 'det': unsupported node"),
    ],
    ids=["unknown", "not implemented"],
)
def test_operators(refusal: Refuse, write_graph: WriteGraph, node: object, expected: str) -> None:
    path = write_graph([node], SQUARE, {"y": (FLOAT, None)})
    assert refusal(path) == (
        BuildFault.REFUSED,
        f"graph.onnx: TensorRT for RTX refused the model: {expected}",
    )


@pytest.mark.parametrize("dtype", ["DOUBLE", "UINT16", "STRING", "FLOAT8E4M3FN"])
def test_element_types(refusal: Refuse, write_graph: WriteGraph, dtype: str) -> None:
    kind = getattr(TensorProto, dtype)
    node = helper.make_node("Identity", ["x"], ["y"])
    path = write_graph([node], {"x": (kind, [4])}, {"y": (kind, [4])})
    assert refusal(path) == (
        BuildFault.REFUSED,
        f"graph.onnx: 'x' has elements of type {dtype}, which a TensorRT plan cannot have; "
        "expected one of BOOL, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16, FLOAT",
    )


def test_names_that_are_meant_to_disturb(refusal: Refuse, write_graph: WriteGraph) -> None:
    name = "\x1b[2J\n" + "Assertion failed: (a) == b" * 10_000
    path = write_graph(
        [helper.make_node("Det", ["x"], ["y"], name=name)], SQUARE, {"y": (FLOAT, None)}
    )
    fault, text = refusal(path)
    assert fault is BuildFault.REFUSED
    assert text.isprintable()
    path = write_graph(
        [helper.make_node("Identity", [name], ["y"])],
        {name: (TensorProto.DOUBLE, [4])},
        {"y": (TensorProto.DOUBLE, [4])},
    )
    assert refusal(path)[1].isprintable()


def test_files(refusal: Refuse, sum_path: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.onnx") == (
        BuildFault.MISSING,
        "no.onnx: No such file or directory",
    )
    (tmp_path / "bad.onnx").write_bytes(np.random.default_rng(0).bytes(4000))
    assert refusal(tmp_path / "bad.onnx") == (
        BuildFault.REFUSED,
        "bad.onnx: not a readable ONNX file",
    )
    (tmp_path / "weights.bin").unlink()
    fault, text = refusal(sum_path, profiles=[ROWS])
    assert fault is BuildFault.REFUSED
    assert text.endswith("Failed to import initializer: w; Failed to open file: weights.bin")


def test_inputs_whose_values_are_shapes(refusal: Refuse, write_graph: WriteGraph) -> None:
    path = write_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        {"x": (FLOAT, [2, 6]), "s": (TensorProto.INT64, [2])},
        {"y": (FLOAT, ["a", "b"])},
    )
    assert refusal(path) == (
        BuildFault.REFUSED,
        "graph.onnx: the values of input 's' set shapes, which no profile here can bound",
    )


def test_profiles_that_do_not_fit(refusal: Refuse, sum_path: Path) -> None:
    assert refusal(sum_path) == (
        BuildFault.REFUSED,
        "graph.onnx: no profile is given, and input 'x' of shape [-1, 64] has open dimensions",
    )


def test_options_that_this_machine_cannot_honour(refusal: Refuse, sum_path: Path) -> None:
    """A machine without a GPU, that is: where there is one, they may succeed."""
    fault, text = refusal(sum_path, profiles=[ROWS], compute_capabilities=())
    assert fault is BuildFault.MISSING
    assert "TensorRT for RTX cannot build the model: cudaError 35: " in text
    assert text.endswith(
        "There is no GPU with a working driver here: name the compute capabilities to build for, "
        "or build where such a GPU is"
    )


def test_refittable_plans_need_a_gpu(
    request_for: Callable[..., PlanRequest], sum_path: Path, tmp_path: Path
) -> None:
    """In a process of its own: what TensorRT for RTX says depends on what it built before."""
    request = request_for(sum_path, profiles=(ROWS,), is_refittable=True)
    with pytest.raises(BuildError) as caught:
        run_build(request, tmp_path, BuildLimits(), lambda *_: None, threading.Event())
    assert caught.value.fault is BuildFault.MISSING
    assert "is compiled by the driver of a GPU: build it where there is one" in str(caught.value)


def test_options_that_the_package_cannot_honour(refusal: Refuse, models: Models) -> None:
    model = models["magika"]
    fault, text = refusal(model.path, profiles=[model.profile], is_version_compatible=True)
    assert fault is BuildFault.REFUSED
    assert text.endswith("TensorRT's lean runtime, which is not in this package: leave it out")
    fault, text = refusal(model.path, profiles=[model.profile], workspace_bytes=1 << 20)
    assert fault is BuildFault.REFUSED
    assert text.endswith("Raise workspace_mib")


def test_another_version_than_the_plan_was_asked_of(sum_path: Path) -> None:
    from thirdrail_engines.tensorrt.builder import build

    request = PlanRequest(sum_path, Builder.TENSORRT_RTX, "1.0.0.1")
    with pytest.raises(BuildError, match=r"when this build was asked for it was 1\.0\.0\.1") as got:
        build(request, sum_path, sum_path.parent, lambda *_: None)
    assert got.value.fault is BuildFault.MISSING


def test_plugins_that_are_none(refusal: Refuse, sum_path: Path) -> None:
    fault, text = refusal(sum_path, profiles=[ROWS], plugins=[Path("/no/such.so")])
    assert fault is BuildFault.REFUSED
    assert "refused the plugin such.so: Unable to load library" in text


@pytest.mark.needs_gcc
def test_a_library_without_plugins(refusal: Refuse, sum_path: Path, tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    source = tmp_path / "plugins.c"
    source.write_text(
        "void setLoggerFinder(void* finder) {}\n"
        "void* getCreators(int* count) { *count = 0; return 0; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    fault, text = refusal(sum_path, profiles=[ROWS], plugins=[library])
    assert fault is BuildFault.REFUSED
    assert text.endswith(
        "the plugin plugins.so: No creator returned by getPluginCreators in plugins.so"
    )


@pytest.mark.needs_gcc
def test_a_library_with_a_plugin(
    request_for: Callable[..., PlanRequest], sum_path: Path, tmp_path: Path
) -> None:
    """It is loaded, warned of, and asked for its plugin, which it does not create."""

    def build_apart(name: str) -> BuiltPlan:
        folder = tmp_path / name
        folder.mkdir()
        request = request_for(sum_path, profiles=(ROWS,), plugins=(library,))
        return run_build(request, folder, BuildLimits(), lambda *_: None, threading.Event())

    library = tmp_path / "plugin.so"
    source = Path(__file__).with_name("plugin.cpp")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    assert build_apart("first").warnings == (
        "the plugin plugin.so is trusted code: it runs with the rights of the build, and with "
        "those of the server once the plan is loaded",
    )
    model = onnx.load(sum_path, load_external_data=False)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Nope", "own"
    onnx.save(model, sum_path)
    with pytest.raises(BuildError, match="Nope node 'sum': Could not create the plugin"):
        build_apart("second")
