# SPDX-License-Identifier: Apache-2.0
"""The operator cases that ship inside the `onnx` wheel, one after the other through a real server.

Each is a model of one operator (or of what it expands to) with inputs and the outputs that ONNX
expects. A case is loaded, called over gRPC and over the lane, compared, and unloaded.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from support.models import write
from thirdrail import Client
from thirdrail.errors import ThirdrailError
from thirdrail.tensors import Array

# Two units in the last place of a BF16, which is coarser than the cases' own tolerance.
BF16_RTOL_MIN = 2**-6

# The newest that the ONNX Runtime of constraints.txt serves without being told to try others.
OPSET_MAX = 26
IR_VERSION_MAX = 13

CALL_S_MAX = 30


@dataclass(frozen=True, slots=True, eq=False)
class OperatorCase:
    name: str
    model: onnx.ModelProto
    inputs: dict[str, Any]  # what is no tensor, as ONNX gives it: its model does not load
    outputs: dict[str, Any]
    rtol: float
    atol: float


def all_cases() -> list[OperatorCase]:
    """Takes seconds: the inputs and outputs are computed when the cases are imported.

    Cases that are stamped with a newer opset than ONNX Runtime serves follow once more, with the
    newest one that it does, as NAME@OPSET: most operators have not changed since.
    """
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflows that the cases mean to show
        cases = [_of(case) for case in load_model_tests(kind="node")]
    return cases + [_stamped_older(case) for case in cases if _is_too_new(case.model)]


def cases_of(*modules: str) -> list[OperatorCase]:
    """The cases of some of onnx.backend.test.case.node's modules, which are named as operators."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            importlib.import_module(f"{node.__name__}.{name}")
    return [_of(case) for case in node._NodeTestCases]


def _is_too_new(model: onnx.ModelProto) -> bool:
    newest = max((each.version for each in model.opset_import if not each.domain), default=0)
    return newest > OPSET_MAX or model.ir_version > IR_VERSION_MAX


def _stamped_older(case: OperatorCase) -> OperatorCase:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = min(model.ir_version, IR_VERSION_MAX)
    for each in model.opset_import:
        if not each.domain:
            each.version = min(each.version, OPSET_MAX)
    return replace(case, name=f"{case.name}@{OPSET_MAX}", model=model)


def _of(case: Any) -> OperatorCase:
    ((inputs, outputs),) = case.data_sets
    graph = case.model.graph
    return OperatorCase(
        case.name,
        case.model,
        dict(zip((each.name for each in graph.input), map(_value, inputs), strict=True)),
        dict(zip((each.name for each in graph.output), map(_value, outputs), strict=True)),
        case.rtol,
        case.atol,
    )


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if value is None or isinstance(value, list):
        return value
    array: Array = np.asarray(value)
    if array.dtype.kind in "OU":
        texts = [text.encode() if isinstance(text, str) else text for text in array.flat]
        array = np.empty(array.shape, np.object_)
        array.reshape(-1)[:] = texts
    return array


def write_cases(repository: Path, cases: Sequence[OperatorCase]) -> None:
    for case in cases:
        write(repository, case.name, case.model)


def run_cases(url: str, cases: Sequence[OperatorCase]) -> dict[str, str]:
    """What went wrong with each case, by its name; empty where every output is right on both ways.

    url: of a server with explicit model control, whose repository has the cases.
    """
    with Client(url, transport="grpc") as grpc, Client(url, transport="lane") as lane:
        return {case.name: _failure(case, {"gRPC": grpc, "the lane": lane}) for case in cases}


def _failure(case: OperatorCase, clients: dict[str, Client]) -> str:
    control = clients["gRPC"]
    try:
        control.load(case.name)
    except ThirdrailError as error:
        return f"load: {error}"
    try:
        faults = {way: _called(case, client) for way, client in clients.items()}
    finally:
        control.unload(case.name)
    return "; ".join(f"over {way}: {fault}" for way, fault in faults.items() if fault)


def _called(case: OperatorCase, client: Client) -> str:
    try:
        result = client.infer(case.name, case.inputs, timeout=CALL_S_MAX)
    except ThirdrailError as error:
        return f"run: {error}"
    for name, expected in case.outputs.items():
        fault = _fault(result[name], expected, case.rtol, case.atol)
        if fault and not _fault(result[name], _direct(case)[name], 0, 0):
            return f"ONNX Runtime's own output '{name}': {fault}"
        if fault:
            return f"output '{name}': {fault}"
    return ""


def _direct(case: OperatorCase) -> dict[str, Array]:
    """What ONNX Runtime answers without a server; BF16 and BYTES inputs cannot be passed to it."""
    session = onnxruntime.InferenceSession(case.model.SerializeToString())
    return dict(zip(case.outputs, session.run(list(case.outputs), case.inputs), strict=True))


def _fault(got: Array, expected: Array, rtol: float, atol: float) -> str:
    """As onnx.backend.test.runner compares."""
    if got.dtype != expected.dtype:
        return f"dtype {got.dtype}, expected {expected.dtype}"
    if got.shape != expected.shape:
        return f"shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype == np.object_:
        return "" if np.array_equal(got, expected) else f"values {got!r}, expected {expected!r}"
    if got.dtype.name == "bfloat16":
        got, expected = got.astype(np.float32), expected.astype(np.float32)
        rtol = max(rtol, BF16_RTOL_MIN)
    try:
        np.testing.assert_allclose(got, expected, rtol, atol)
    except AssertionError as error:
        return "values: " + " ".join(str(error).split())[:300]
    return ""
