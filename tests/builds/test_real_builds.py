# SPDX-License-Identifier: Apache-2.0
"""Builds by the product's own process, with ONNX Runtime's builder."""

import dataclasses
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support import models
from support.compilations import BUILD_PHASES
from thirdrail_engines import EngineOptions, Inspector, seeded_inputs
from thirdrail_engines.builds import BuildLimits, BuiltPlan, PlanTensor, run_build
from thirdrail_engines.builds.run import _COMMAND
from thirdrail_engines.onnxruntime_engine import load_onnx, load_plan
from thirdrail_engines.plans import Builder, BuildError, BuildFault, PlanRequest, TellProgress


def test_a_plan_answers_as_its_source_does(source: Path, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    threads: set[int] = set()

    def tell(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))
        threads.add(threading.get_ident())

    built = build(source, folder, tell=tell)
    assert told == [
        ("starting the build", 0, 0),
        ("reading", 0, 3),
        ("optimising", 1, 3),
        ("writing", 2, 3),
    ]
    assert threads == {threading.get_ident()}
    assert built.plan.parent == folder
    assert built.layers == built.source_layers == {"Add": 1}
    assert built.tensors == (
        PlanTensor("a", "FP32", (-1, 4), is_input=True),
        PlanTensor("c", "FP32", (-1, 4), is_input=False),
    )
    assert built.conversion is None
    assert 0 < built.seconds < 60
    assert built.peak_memory_bytes > 1 << 20
    engine = load_plan(built.plan.read_bytes(), source, options=EngineOptions())
    a = np.zeros((2, 4), np.float32)
    assert engine.run({"a": a}, ["c"], {})["c"].tolist() == [[1] * 4] * 2
    engine.close()


def test_the_optimisations_are_in_the_plan(tmp_path: Path, folder: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((16, 16, 3, 3), np.float32)
    built = models.model(
        [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Add", ["one", "one"], ["two"]),
            helper.make_node("Mul", ["b", "two"], ["y"]),
        ],
        [models.tensor("x", "FP32", (1, 16, 8, 8))],
        [models.tensor("y", "FP32", (1, 16, 6, 6))],
        [models.constant("w", weights), models.constant("one", np.ones(1, np.float32))],
    )
    path = tmp_path / "conv.onnx"
    onnx.save(built, path)
    plan = build(path, folder)
    assert plan.source_layers == {"Conv": 1, "Relu": 1, "Add": 1, "Mul": 1}
    assert "Add" not in plan.layers  # folded
    assert "Relu" not in plan.layers  # fused
    data = plan.plan.read_bytes()
    assert agree(path, data)


def test_weights_beside_the_model_are_in_the_plan(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "large.onnx"
    onnx.save(matrix(), path, save_as_external_data=True, location="large.data", size_threshold=0)
    built = build(path, folder)
    data = built.plan.read_bytes()
    assert agree(path, data)
    for file in tmp_path.glob("large.*"):
        file.unlink()
    load_plan(data, path, options=EngineOptions()).close()


def test_weights_in_bodies_are_in_the_plan(tmp_path: Path, folder: Path) -> None:
    inside = numpy_helper.from_array(np.full(2000, 3, np.float32), "inside")
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    branches: dict[str, Any] = {
        name: helper.make_graph(
            [helper.make_node(op, ["x", "inside"], ["out"])], name, [], [out], [inside]
        )
        for name, op in (("then_branch", "Add"), ("else_branch", "Sub"))
    }
    built = models.model(
        [helper.make_node("If", ["c"], ["y"], **branches)],
        [models.tensor("c", "BOOL", ()), models.tensor("x", "FP32", (2000,))],
        [models.tensor("y", "FP32", (2000,))],
    )
    path = tmp_path / "branches.onnx"
    onnx.save(built, path)
    plan = build(path, folder)
    assert plan.layers == plan.source_layers == {"Add": 1, "If": 1, "Sub": 1}
    assert agree(path, plan.plan.read_bytes())


def test_what_cannot_be_read_is_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(BuildError) as caught:
        build(path, folder)
    assert caught.value.fault is BuildFault.REFUSED
    assert str(caught.value) == (
        "model.onnx: not a readable ONNX file, perhaps cut short or damaged"
    )


def test_cancelled_at_any_moment(source: Path, tmp_path: Path) -> None:
    """The build takes about 0.4 s, so most of these cut it short, the first ones on any host. How
    fast that is, is not asked here: a busy one lets the killed process end when it comes to that.
    """
    request = PlanRequest(source, Builder.ONNXRUNTIME, "")
    randomness = random.Random(0)
    cut_short = 0
    for turn in range(6):
        folder = tmp_path / f"build{turn}"
        folder.mkdir()
        cancelled = threading.Event()
        delay_s = randomness.uniform(0, 0.08 * turn)
        timer = threading.Timer(delay_s, cancelled.set)
        timer.start()
        fault = None
        try:
            run_build(request, folder, BuildLimits(), lambda *_: None, cancelled)
        except BuildError as error:
            fault = error.fault
            cut_short += 1
        assert fault in (None, BuildFault.CANCELLED)
        timer.join()
    assert cut_short > 1


def test_a_package_that_was_replaced_under_a_running_server_builds_no_plan(
    request_for: PlanRequest, folder: Path
) -> None:
    """It would be kept, and found, as one of the version that the server still runs."""
    request = dataclasses.replace(request_for, builder_version="1.0.0")
    with pytest.raises(BuildError, match=r"who asked for this build runs 1\.0\.0") as caught:
        run_build(request, folder, BuildLimits(), lambda *_: None, threading.Event())
    assert caught.value.fault is BuildFault.MISSING


def test_builds_take_turns(source: Path, tmp_path: Path) -> None:
    request = PlanRequest(source, Builder.ONNXRUNTIME, "")
    told: list[str] = []
    seen: list[int] = []
    at_work = threading.Semaphore(0)
    open_gate = threading.Event()

    def first_tell(phase: str, done: int, steps: int) -> None:
        at_work.release()
        assert open_gate.wait(100)

    def run(name: str, tell: TellProgress) -> None:
        folder = tmp_path / name
        folder.mkdir()
        build(source, folder, tell=tell)
        seen.append(1)

    first = threading.Thread(target=run, args=("first", first_tell))
    first.start()
    assert at_work.acquire(timeout=30)
    second = threading.Thread(target=run, args=("second", lambda phase, *_: told.append(phase)))
    second.start()
    while not told:
        time.sleep(0.01)
    assert told == ["waiting for another build"]
    # Who waits can be cancelled, too; and another limit lets more in.
    cancelled = threading.Event()
    cancelled.set()
    third = tmp_path / "third"
    third.mkdir()
    with pytest.raises(BuildError, match="cancelled"):
        run_build(request, third, BuildLimits(), lambda *_: None, cancelled)
    build(source, third, BuildLimits(builds_at_once_max=2))
    assert not seen
    open_gate.set()
    first.join()
    second.join()
    assert told == ["waiting for another build", *BUILD_PHASES]


@pytest.mark.parametrize(
    ("package", "change", "expected"),
    [
        (
            "onnxruntime",
            {},
            "the package 'onnxruntime' is missing: pip install 'thirdrail[server]'",
        ),
        ("tensorrt_rtx", {"builder": Builder.TENSORRT_RTX}, "pip install"),
    ],
)
def test_a_missing_package_is_named(
    source: Path,
    tmp_path: Path,
    folder: Path,
    package: str,
    change: dict[str, Any],
    expected: str,
) -> None:
    """The import of it fails in the real child as it does where it is not installed."""
    start = tmp_path / "start.py"
    start.write_text(
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        f"sys.argv[0] = {_COMMAND[-1]!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    request = dataclasses.replace(PlanRequest(source, Builder.ONNXRUNTIME, ""), **change)
    with pytest.raises(BuildError) as caught:
        run_build(
            request,
            folder,
            BuildLimits(),
            lambda *_: None,
            threading.Event(),
            command=[*_COMMAND[:-1], str(start)],
        )
    assert caught.value.fault is BuildFault.MISSING
    assert expected in str(caught.value)


def build(
    path: Path,
    folder: Path,
    limits: BuildLimits | None = None,
    tell: TellProgress = lambda *_: None,
) -> BuiltPlan:
    request = PlanRequest(path, Builder.ONNXRUNTIME, "")
    return run_build(request, folder, limits or BuildLimits(), tell, threading.Event())


def agree(path: Path, plan: bytes) -> bool:
    """Whether the plan gives exactly what its source does, and says the same of itself."""
    options = EngineOptions()
    with Inspector() as inspector:
        direct = load_onnx(path, options=options, inspector=inspector)
    planned = load_plan(plan, path, options=options)
    names = [tensor.name for tensor in direct.spec.outputs]
    inputs = seeded_inputs(direct.spec.inputs, 2)
    assert inputs is not None
    expected, came = (engine.run(inputs, names, {}) for engine in (direct, planned))
    same = all(expected[name].tobytes() == came[name].tobytes() for name in names)
    is_agreed = same and direct.spec == planned.spec
    direct.close()
    planned.close()
    return is_agreed


def matrix() -> onnx.ModelProto:
    weights = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    return models.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [models.tensor("x", "FP32", ("n", 64))],
        [models.tensor("y", "FP32", ("n", 64))],
        [models.constant("w", weights)],
    )
