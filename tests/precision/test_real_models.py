# SPDX-License-Identifier: Apache-2.0
"""Models in real use, converted: how far off, and how large their plans are."""

import threading
from pathlib import Path
from typing import Any

import pytest

from precision.conftest import BF16, BOTH, FP16, ignore
from thirdrail_engines.plans import Precision
from thirdrail_engines.precision import convert

# Of the largest magnitude of an output; about twice what was measured.
REL_MAX = {
    "magika": (4e-3, 2e-2),
    "ocr_detection": (4e-2, 0.4),
    "ocr_recognition": (6e-2, 0.3),
    "ocr_orientation": (6e-3, 5e-2),
    "silero_vad_half": (8e-3, 6e-2),
    "silero_vad_ifless": (2e-2, 7e-2),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(REL_MAX))
@BOTH
def test_real_models_stay_near_themselves(folder: Path, name: str, precision: Precision) -> None:
    from support.plan_models import plan_models

    model = plan_models()[name]
    report = convert(model.path, precision, folder, ignore, [model.profile]).report
    outputs: Any = report["outputs"]
    assert outputs
    assert report["not_measured_because"] == ""
    rel_max = REL_MAX[name][0 if precision is FP16 else 1]
    for output in outputs:
        assert rel_max / 100 < output["max_rel"] < rel_max
        assert output["cosine"] > (0.9999 if precision is FP16 else 0.996)
        assert output["not_finite"] == 0
        assert output["compared"] > 0
    if name == "magika":  # whose normalisation reaches 150,000
        assert precision is BF16 or report["kept_for_their_range_count"] == 9


@pytest.mark.needs_tensorrt
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["magika", "ocr_detection", "ocr_recognition", "silero_vad_ifless"]
)
@BOTH
def test_converted_models_become_smaller_plans(
    folder: Path, name: str, precision: Precision
) -> None:
    """What TensorRT for RTX takes in FP32, it takes in both."""
    from support.plan_models import plan_models
    from thirdrail_engines.builds import BuildLimits, run_build
    from thirdrail_engines.plans import Builder, PlanRequest
    from thirdrail_engines.tensorrt import installed_builders

    model = plan_models()[name]
    version = dict(installed_builders())[Builder.TENSORRT_RTX]
    sizes = []
    for each in (Precision.AS_IS, precision):
        request = PlanRequest(
            model.path, Builder.TENSORRT_RTX, version, each, (model.profile,), ("sm86",)
        )
        place = folder / str(each)
        place.mkdir()
        limits = BuildLimits(memory_bytes_max=1 << 30)
        built = run_build(request, place, limits, ignore, threading.Event())
        sizes.append(built.plan.stat().st_size)
    conversion: Any = built.conversion
    assert conversion["precision"] == str(precision)
    # Silero's plan is kernels for the most part, and those for recurrences do not shrink.
    assert sizes[1] < (0.8 if name != "silero_vad_ifless" else 1.1) * sizes[0]
