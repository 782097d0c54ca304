# SPDX-License-Identifier: Apache-2.0
"""TensorRT plans as programs: our side of the conversation with the runtime.

The other side is played on a twin; that the names exist in the real packages, tests/tensorrt_plans
checks. No plan ran on a GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.conftest import WriteModel
from support.plan_runs import (
    test_finished_kernels_are_given_to_the_next_process,
    test_fixed_shapes_need_no_profile,
    test_graphs_are_recorded_by_the_runtime_or_by_us,
    test_results_whose_size_only_the_run_tells,
)
from support.twin_tensorrt import ACTIVATION_BYTES, Engine, RuntimeConfig, member, twin_api
from support.twins import any_size
from thirdrail_engines import EngineError, Inspector, ModelFileError
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.plans import Builder, BuildError, Profile, ShapeRange
from thirdrail_engines.tensorrt import engine as plan_engine
from thirdrail_engines.tensorrt.api import load_api
from thirdrail_engines.tensorrt.engine import KernelNotes, load_plan
from thirdrail_engines.tensorrt.output_allocator import Rooms, make_output_allocator
from thirdrail_engines.tensorrt.runtime_choices import RuntimeChoices, choose

__all__ = [  # run here with what this module loads
    "test_finished_kernels_are_given_to_the_next_process",
    "test_fixed_shapes_need_no_profile",
    "test_graphs_are_recorded_by_the_runtime_or_by_us",
    "test_results_whose_size_only_the_run_tells",
]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = helper.make_node
Load = Callable[..., CudaEngine]

TWO_PROFILES = tuple(
    Profile({"x": ShapeRange((low,), (low,), (high,))}) for low, high in ((1, 4), (100, 200))
)


@pytest.fixture
def load(device: TwinDevice, inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Any:
    """load(path, profiles=..., is_rtx=..., notes=..., **options): an engine, closed in the end."""
    engines: list[CudaEngine] = []

    def load_one(
        path: Path,
        profiles: tuple[Profile, ...] | None = None,
        is_rtx: bool = False,
        notes: KernelNotes | None = None,
        **options: int,
    ) -> CudaEngine:
        def profiles_of(path: Path) -> tuple[Profile, ...]:
            return any_size(path, inspector, 100_000) if profiles is None else profiles

        api = twin_api(device, inspector, profiles_of, is_rtx=is_rtx)
        monkeypatch.setattr(plan_engine, "load_api", lambda builder: api)
        engine = load_plan(
            str(path).encode(),
            "the plan",
            builder=api.builder,
            device=device,
            options=CudaOptions(**options),
            notes=notes,
        )
        engines.append(engine)
        return engine

    yield load_one
    for engine in engines:
        engine.close()


@pytest.fixture(params=[False, True], ids=["TensorRT", "for RTX"])
def is_rtx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def load_plan_of(load: Load, is_rtx: bool) -> Load:
    return functools.partial(load, is_rtx=is_rtx)


@pytest.fixture
def double(write_model: WriteModel) -> Path:
    return write_model(
        [Node("Add", ["x", "x"], ["y"])], {"x": (FLOAT, ["n"])}, {"y": (FLOAT, ["n"])}
    )


@pytest.fixture
def fixed(write_model: WriteModel) -> Path:
    return write_model([Node("Neg", ["x"], ["y"])], {"x": (FLOAT, [4])}, {"y": (FLOAT, [4])})


def test_shapes_choose_the_profile(double: Path, load: Load) -> None:
    engine = load(double, TWO_PROFILES)
    assert [(t.name, t.shape) for t in engine.spec.inputs] == [("x", (-1,))]
    for count in (1, 100, 4, 200, 200, 1, 1):
        x = np.arange(count, dtype=np.float32)
        assert engine.run({"x": x}, ["y"], {})["y"].tolist() == (2 * x).tolist()
    with pytest.raises(EngineError, match=r"this model takes \[1\] to \[4\] or \[100\] to \[200\]"):
        engine.run({"x": np.ones(50, np.float32)}, ["y"], {})


def test_a_result_that_is_too_large_says_how_much_it_takes(
    write_model: WriteModel, load: Load
) -> None:
    path = write_model(
        [Node("NonZero", ["x"], ["y"])], {"x": (FLOAT, ["n"])}, {"y": (INT64, [1, "k"])}
    )
    engine = load(path, open_output_bytes_max=800)
    with pytest.raises(EngineError, match="output 'y': takes 808 bytes, at most 800 are allowed"):
        engine.run({"x": np.ones(101, np.float32)}, ["y"], {})


def test_what_tensorrt_says_is_in_the_error(double: Path, load: Load) -> None:
    engine = load(double)
    context: Any = engine._instances[0]._context
    with pytest.raises(EngineError) as caught:
        context.prepare(0, {"x": (200_000,)}, engine._instances[0]._compute)
    assert str(caught.value) == (
        "TensorRT refuses the shape [200000] of input 'x': x [200000] is not in the profile"
    )
    x = np.ones(2, np.float32)
    assert engine.run({"x": x}, ["y"], {})["y"].tolist() == [2, 2]


def test_a_plan_that_does_not_load_names_what_was_said(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"the plan does not load: no plan: .*nothing"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("what", "answer", "text"),
    [
        ("get_tensor_location", "HOST", "'x' sets shapes by its values, and is read on the host"),
        ("get_tensor_format", "CHW32", "'x' lies in memory as CHW32, expected LINEAR"),
        ("get_tensor_dtype", "FP8", "'x' has the type FP8"),
    ],
)
def test_tensors_that_cannot_be_bound_are_refused_at_load(
    double: Path, load: Load, monkeypatch: pytest.MonkeyPatch, what: str, answer: str, text: str
) -> None:
    monkeypatch.setattr(Engine, what, lambda self, name: member(answer))
    with pytest.raises(ModelFileError, match=text):
        load(double)


# TensorRT for RTX


def test_rtx_compiles_nothing_on_a_request_and_records_its_own_graphs(
    double: Path, fixed: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[RuntimeConfig] = []
    plain_create = Engine.create_runtime_config

    def create(engine: Engine) -> RuntimeConfig:
        configs.append(plain_create(engine))
        return configs[-1]

    monkeypatch.setattr(Engine, "create_runtime_config", create)
    for path, kernels in ((double, "none"), (fixed, "eager")):
        engine = load(path, is_rtx=True)
        assert configs[-1].dynamic_shapes_kernel_specialization_strategy == kernels
        assert configs[-1].cuda_graph_strategy == "whole"
        for _ in range(4):
            engine.run({"x": np.ones(4, np.float32)}, ["y"], {})
        assert sum(figures.recorded for figures in engine.graph_figures) == 0
    load(double, is_rtx=True, graphs_max=0)
    assert configs[-1].cuda_graph_strategy == "disabled"


def test_finished_kernels_are_kept_for_the_next_process(double: Path, load: Load) -> None:
    kept: list[bytes] = []
    notes = KernelNotes(lambda: kept[-1] if kept else None, kept.append)
    load(double, is_rtx=True, notes=notes).close()
    assert kept == [b"k"]
    load(double, is_rtx=True, notes=notes).close()
    assert kept == [b"k"]  # they were used, and nothing was added
    kept[0] = b"of another driver"
    load(double, is_rtx=True, notes=notes).close()
    assert kept == [b"of another driver", b"k"]


@pytest.mark.parametrize(
    ("profiles", "is_rtx", "graphs_max", "expected"),
    [
        (TWO_PROFILES, False, 8, RuntimeChoices(False, False, 8, True)),
        ((), False, 0, RuntimeChoices(False, False, 0, True)),
        (TWO_PROFILES, True, 8, RuntimeChoices(False, True, 0, False)),
        ((), True, 8, RuntimeChoices(True, True, 0, False)),
        ((), True, 0, RuntimeChoices(True, False, 0, True)),
        (
            (Profile({"x": ShapeRange((4,), (4,), (4,))}),),
            True,
            8,
            RuntimeChoices(True, True, 0, False),
        ),
    ],
)
def test_graphs_are_recorded_by_one_of_the_two(
    profiles: tuple[Profile, ...], is_rtx: bool, graphs_max: int, expected: RuntimeChoices
) -> None:
    found = choose(profiles, prepares_at_run_time=is_rtx, can_share=True, graphs_max=graphs_max)
    assert found == expected
    assert not (found.records_graphs and found.our_graphs_max)
    assert not (found.records_graphs and found.shares_memory)
    older = choose(profiles, prepares_at_run_time=is_rtx, can_share=False, graphs_max=graphs_max)
    assert older == replace(expected, shares_memory=False)


# Memory to compute in


def test_plans_compute_in_memory_that_they_share(
    double: Path, fixed: Path, load: Load, device: TwinDevice
) -> None:
    for path in (double, fixed, double):
        engine = load(path)
        for value in range(4):
            x = np.full(4, value, np.float32)
            engine.run({"x": x}, ["y"], {})
    assert device.activations.nbytes == 2 * ACTIVATION_BYTES


def test_where_the_runtime_records_graphs_contexts_have_memory_of_their_own(
    double: Path, load: Load, device: TwinDevice
) -> None:
    load(double, is_rtx=True)
    assert device.activations.nbytes == 0
    load(double, is_rtx=True, graphs_max=0)
    assert device.activations.nbytes == ACTIVATION_BYTES


def test_a_runtime_without_names_for_it_has_memory_of_its_own(
    double: Path, load: Load, device: TwinDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 10.0."""
    monkeypatch.delattr(Engine, "device_memory_size_v2")
    engine = load(double)
    assert device.activations.nbytes == 0
    assert engine.run({"x": np.ones(2, np.float32)}, ["y"], {})["y"].tolist() == [2, 2]


# The real package, as far as it goes without a GPU


@pytest.mark.needs_tensorrt
def test_the_real_runtime_says_why_it_does_not_start(device: TwinDevice) -> None:
    """On a machine with a GPU, it starts, and refuses the plan."""
    with pytest.raises((ModelFileError, BuildError), match="the plan"):
        load_plan(
            b"no plan",
            "the plan",
            builder=Builder.TENSORRT_RTX,
            device=device,
            options=CudaOptions(),
        )


@pytest.mark.needs_tensorrt
def test_the_real_package_takes_our_allocator_and_gives_shapes_that_we_read() -> None:
    trt = load_api(Builder.TENSORRT_RTX).trt
    rooms = Rooms()
    allocator = make_output_allocator(trt, rooms)
    assert isinstance(allocator, trt.IOutputAllocator)
    told: list[tuple[int, ...]] = []

    class Room:
        def reserve(self, nbytes: int) -> int:
            return 1000 + nbytes

        def tell(self, shape: tuple[int, ...]) -> None:
            told.append(shape)

    rooms.bound["y"] = Room()
    assert allocator.reallocate_output_async("y", 0, 24, 256, 0) == 1024
    assert allocator.reallocate_output("y", 0, 0, 256) == 1001  # never a null address
    assert allocator.reallocate_output_async("other", 0, 24, 256, 0) == 0
    allocator.notify_shape("y", trt.Dims([2, 3]))
    assert told == [(2, 3)]
