# SPDX-License-Identifier: Apache-2.0
"""Real builds by TensorRT for RTX, of real models and of models made for the purpose.

The folder is not called `tensorrt`: as pytest puts `tests` on the path, that would pass for the
package where it is not installed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support.plan_models import PlanModel, plan_models
from thirdrail_engines.builds.result import Built
from thirdrail_engines.plans import Builder, PlanRequest, TellProgress
from thirdrail_engines.tensorrt import installed_builders

Build = Callable[..., Built]
RequestFor = Callable[..., PlanRequest]
WriteGraph = Callable[..., Path]


@pytest.fixture(scope="session")
def models() -> dict[str, PlanModel]:
    return plan_models()


@pytest.fixture(scope="session")
def request_for() -> RequestFor:
    """request_for(path, **options of PlanRequest): for sm86 if nothing else is said."""

    def make(path: Path, **options: Any) -> PlanRequest:
        version = dict(installed_builders())[Builder.TENSORRT_RTX]
        options = {"compute_capabilities": ("sm86",), **options}
        return PlanRequest(path, Builder.TENSORRT_RTX, version, **options)

    return make


@pytest.fixture
def build(tmp_path: Path, request_for: RequestFor) -> Build:
    """build(path, tell, **options of PlanRequest): in this process."""
    from thirdrail_engines.tensorrt.builder import build as build_plan

    def build_here(
        path: Path, tell: TellProgress = lambda phase, step, steps: None, **options: Any
    ) -> Built:
        folder = tmp_path / "build"
        folder.mkdir(exist_ok=True)
        return build_plan(request_for(path, **options), path, folder, tell)

    return build_here


@pytest.fixture
def write_graph(tmp_path: Path) -> WriteGraph:
    """write_graph(nodes, inputs, outputs, weights=..., **more for onnx.save) -> the file.

    inputs, outputs: name -> ONNX element type and dimensions. weights: name -> array.
    """

    def write(nodes: Any, inputs: Any, outputs: Any, weights: Any = None, **more: Any) -> Path:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        path = tmp_path / "graph.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path, **more)
        return path

    return write


@pytest.fixture
def sum_path(write_graph: WriteGraph) -> Path:
    """x [n, 64] + w [64] -> y, with w in a file beside it."""
    return write_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="sum")],
        {"x": (TensorProto.FLOAT, ["n", 64])},
        {"y": (TensorProto.FLOAT, ["n", 64])},
        {"w": np.arange(64, dtype=np.float32)},
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
