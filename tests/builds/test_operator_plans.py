# SPDX-License-Identifier: Apache-2.0
"""Every operator case of the `onnx` wheel, as a plan and directly: the same to the last bit."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest

from support.operator_cases import OperatorCase, all_cases
from thirdrail import dtypes
from thirdrail.tensors import Array
from thirdrail_engines import Engine, EngineError, EngineOptions, Inspector, ModelFileError
from thirdrail_engines.builders import onnxruntime_builder
from thirdrail_engines.onnxruntime_engine import load_onnx, load_plan
from thirdrail_engines.plans import Builder, PlanRequest

SERVED_MIN = 1500  # of about 2200; the others ONNX Runtime or we refuse either way
OPTIONS = EngineOptions()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_operator_answers_alike(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    served = 0
    with Inspector(idle_s=60) as inspector:
        for case in all_cases():
            onnx.save(case.model, path)
            try:
                direct = load_onnx(path, options=OPTIONS, inspector=inspector)
            except ModelFileError:
                continue
            planned = load_plan(plan_of(path), path, options=OPTIONS)
            assert planned.spec == direct.spec, case.name
            inputs = inputs_of(case, direct)
            assert outcome(planned, inputs) == outcome(direct, inputs), case.name
            direct.close()
            planned.close()
            served += 1
    assert served > SERVED_MIN


def plan_of(path: Path) -> bytes:
    with TemporaryDirectory() as folder:
        request = PlanRequest(path, Builder.ONNXRUNTIME, "")
        build = onnxruntime_builder.build
        return build(request, path, Path(folder), lambda *_: None).plan.read_bytes()


def inputs_of(case: OperatorCase, engine: Engine) -> dict[str, Array]:
    inputs = {}
    for tensor in engine.spec.inputs:
        if tensor.name in case.inputs:
            array = np.asarray(case.inputs[tensor.name])
            if tensor.dtype is dtypes.BYTES:
                elements = [str(element).encode() for element in array.flat]
                inputs[tensor.name] = dtypes.object_array(elements, array.shape)
            else:
                inputs[tensor.name] = array.astype(tensor.dtype.numpy, order="C")
    return inputs


def outcome(engine: Engine, inputs: dict[str, Array]) -> Any:
    """What comes of a run, to be compared as it is: NaN are of one kind, too."""
    names = [tensor.name for tensor in engine.spec.outputs]
    try:
        results = engine.run(inputs, names, {})
    except EngineError as error:
        return str(error)
    return {
        name: (array.shape, array.tolist() if array.dtype == object else array.tobytes())
        for name, array in results.items()
    }
