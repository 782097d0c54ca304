# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked to be, where more than the owner's wishes changes it."""

from pathlib import Path

import pytest

from thirdrail_engines import plan_requests
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_engines.plans import Precision


def converter_of(precision: Precision) -> str:
    request = onnxruntime_request(
        Path("model.onnx"), CompileOptions(), precision=precision, threads_max=1
    )
    return request.converter


def test_a_plan_in_another_precision_belongs_to_what_converted_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_requests, "onnxruntime_version", lambda: "1.99")
    assert converter_of(Precision.FP16) == "rules 1, onnxruntime 1.99"
    assert converter_of(Precision.AS_IS) == ""
