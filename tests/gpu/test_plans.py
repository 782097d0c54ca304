# SPDX-License-Identifier: Apache-2.0
"""Real plans on a real device: the engine contract, graphs, open outputs. Not yet run on a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.conftest import WriteModel
from engines.test_engine_contract import (
    test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing,
    test_a_constant_result_is_not_the_weights,
    test_eight_threads_share_one_engine,
    test_only_wanted_outputs_come_back,
    test_read_only_inputs_are_accepted,
    test_results_outlive_the_engine,
)
from engines.test_engine_failures import (
    test_an_array_that_does_not_fit_is_refused_and_untouched,
    test_what_does_not_fit_the_model_is_an_engine_error,
)
from support.plan_runs import (
    test_finished_kernels_are_given_to_the_next_process,
    test_fixed_shapes_need_no_profile,
    test_graphs_are_recorded_by_the_runtime_or_by_us,
    test_results_whose_size_only_the_run_tells,
)
from support.twins import any_size
from thirdrail_engines import EngineOptions, Inspector
from thirdrail_engines.cuda.driver import DriverDevice
from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions
from thirdrail_engines.onnxruntime_engine import load_onnx
from thirdrail_engines.plans import Builder, BuildError, PlanRequest, Profile
from thirdrail_engines.tensorrt import installed_builders
from thirdrail_engines.tensorrt.builder import build
from thirdrail_engines.tensorrt.engine import KernelNotes, load_plan

__all__ = [
    "test_a_boolean_byte_other_than_zero_or_one_is_true_and_reveals_nothing",
    "test_a_constant_result_is_not_the_weights",
    "test_an_array_that_does_not_fit_is_refused_and_untouched",
    "test_eight_threads_share_one_engine",
    "test_finished_kernels_are_given_to_the_next_process",
    "test_fixed_shapes_need_no_profile",
    "test_graphs_are_recorded_by_the_runtime_or_by_us",
    "test_only_wanted_outputs_come_back",
    "test_read_only_inputs_are_accepted",
    "test_results_outlive_the_engine",
    "test_results_whose_size_only_the_run_tells",
    "test_what_does_not_fit_the_model_is_an_engine_error",
]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Node = helper.make_node


@pytest.fixture
def load_model(
    device: DriverDevice, builder: Builder, inspector: Inspector, tmp_path: Path
) -> Iterator[Callable[..., CudaEngine]]:
    """load_model(path, **options): build the plan here, and load it."""
    engines: list[CudaEngine] = []

    def load_one(
        path: Path,
        threads_max: int = 1,
        profiles: tuple[Profile, ...] | None = None,
        notes: KernelNotes | None = None,
        **options: Any,
    ) -> CudaEngine:
        given = any_size(path, inspector, 200_000) if profiles is None else profiles
        folder = tmp_path / f"plan{len(engines)}"
        folder.mkdir()
        request = PlanRequest(path, builder, dict(installed_builders())[builder], profiles=given)
        try:
            built = build(request, path, folder, lambda *_: None)
        except BuildError as error:
            pytest.skip(f"TensorRT does not build this model: {error}")
        engine = load_plan(
            built.plan.read_bytes(),
            path.name,
            builder=builder,
            device=device,
            options=CudaOptions(**options),
            notes=notes,
        )
        engines.append(engine)
        return engine

    yield load_one
    for engine in engines:
        engine.close()


@pytest.fixture
def load_plan_of(load_model: Callable[..., CudaEngine]) -> Callable[..., CudaEngine]:
    return load_model


@pytest.fixture
def is_rtx(builder: Builder) -> bool:
    return builder is Builder.TENSORRT_RTX


@pytest.fixture
def layers(write_model: WriteModel) -> Path:
    random = np.random.default_rng(0)
    return write_model(
        [
            Node("MatMul", ["x", "w1"], ["h"]),
            Node("Relu", ["h"], ["r"]),
            Node("MatMul", ["r", "w2"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 64])},
        {"y": (FLOAT, ["n", 16])},
        {
            "w1": random.standard_normal((64, 128), np.float32),
            "w2": random.standard_normal((128, 16), np.float32),
        },
    )


def test_results_are_those_of_the_reference(
    layers: Path, inspector: Inspector, load_model: Callable[..., CudaEngine]
) -> None:
    engine = load_model(layers)
    reference = load_onnx(layers, options=EngineOptions(), inspector=inspector)
    random = np.random.default_rng(1)
    for rows in (1, 7, 1, 100, 7, 1, 7, 100, 100):  # plain, recorded, launched
        x = random.standard_normal((rows, 64), np.float32)
        got = engine.run({"x": x}, ["y"], {})["y"]
        np.testing.assert_allclose(got, reference.run({"x": x}, ["y"], {})["y"], 1e-2, 1e-2)
    reference.close()


def test_an_engine_gives_all_memory_back(
    layers: Path, device: DriverDevice, load_model: Callable[..., CudaEngine]
) -> None:
    load_model(layers).close()  # what the library keeps, it keeps
    free = device.memory().free_bytes
    for _ in range(5):
        engine = load_model(layers)
        engine.run({"x": np.ones((4, 64), np.float32)}, ["y"], {})
        engine.close()
    assert device.memory().free_bytes >= free - (8 << 20)
