# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked to be, where more than the owner's wishes changes it."""

import hashlib
from pathlib import Path

import pytest

from thirdrail_engines import amounts, plan_requests, positions
from thirdrail_engines.compile_options import CompileOptions
from thirdrail_engines.plan_requests import onnxruntime_request
from thirdrail_engines.plans import Precision


def converter_of(precision: Precision) -> str:
    request = onnxruntime_request(
        Path("model.onnx"), CompileOptions(), precision=precision, threads_max=1
    )
    return request.converter


def test_a_plan_belongs_to_the_rules_by_which_its_inputs_were_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rules() -> str:
        return onnxruntime_request(
            Path("model.onnx"), CompileOptions(), precision=Precision.AS_IS, threads_max=1
        ).rules

    assert rules() == "positions 1, amounts 1"
    monkeypatch.setattr(positions, "RULES", 99)
    assert rules() == "positions 99, amounts 1"
    monkeypatch.setattr(amounts, "RULES", 98)
    assert rules() == "positions 99, amounts 98"


def test_the_rules_have_another_number_when_their_tables_change() -> None:
    """A plan of older rules would go on to say that an input may be bound in place."""
    tables = {**positions.READERS, "followed": None, **positions.FOLLOWED}
    rows = sorted(f"{name} {inputs and sorted(inputs)}" for name, inputs in tables.items())
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
    assert (positions.RULES, digest) == (1, "66c5ea7d8969de15")


def test_and_so_have_those_of_what_decides_amounts() -> None:
    rows = sorted(f"{name} {sorted(inputs)}" for name, inputs in amounts.DECIDE.items())
    rows += [*sorted(amounts.REFUSED), *sorted(map(str, amounts.VERSIONS_MAX.items()))]
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
    assert (amounts.RULES, digest) == (1, "9ddc52a318290061")


def test_a_plan_in_another_precision_belongs_to_what_converted_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_requests, "onnxruntime_version", lambda: "1.99")
    assert converter_of(Precision.FP16) == "rules 1, onnxruntime 1.99"
    assert converter_of(Precision.AS_IS) == ""
