# SPDX-License-Identifier: Apache-2.0
"""Real models for builders of plans, out of their wheels on PyPI; kept below `.tools/`."""

from dataclasses import dataclass, replace
from pathlib import Path

from support.environments import TOOLS
from thirdrail_engines.plans import Profile, Shape, ShapeRange
from thirdrail_server.demo.fetch import fetch
from thirdrail_server.demo.pinned import PACKAGES, PinnedFile

# Beside those of the demo: two that TensorRT for RTX refuses, and one of them without most of its
# conditional parts.
_MORE = {
    "rapidocr": (
        PinnedFile(
            "ocr_orientation/1/model.onnx",
            "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        ),
    ),
    "silero-vad": (
        PinnedFile(
            "silero_vad_half/1/model.onnx",
            "silero_vad/data/silero_vad_half.onnx",
            "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        ),
        PinnedFile(
            "silero_vad_ifless/1/model.onnx",
            "silero_vad/data/silero_vad_op18_ifless.onnx",
            "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class PlanModel:
    """A model, and the profile that the tests build it for."""

    path: Path
    profile: Profile


def plan_models() -> dict[str, PlanModel]:
    """All of them by name. Downloads what is not there. Raises FetchError."""
    packages = [
        replace(package, files=(*package.files, *_MORE.get(package.name, ())))
        for package in PACKAGES
    ]
    folder = TOOLS / "plan-models"
    fetch(folder, packages=packages)
    return {
        name: PlanModel(folder / name / "1" / "model.onnx", Profile(profile))
        for name, profile in _PROFILES.items()
    }


def _fixed(*shape: int) -> ShapeRange:
    return ShapeRange(shape, shape, shape)


def _range(smallest: Shape, best: Shape, largest: Shape) -> ShapeRange:
    return ShapeRange(smallest, best, largest)


_SPEECH = {"input": _fixed(1, 512), "state": _fixed(2, 1, 128)}

_PROFILES = {
    "magika": {"bytes": _range((1, 2048), (4, 2048), (8, 2048))},
    "ocr_detection": {"x": _range((1, 3, 32, 32), (1, 3, 640, 640), (1, 3, 960, 960))},
    "ocr_recognition": {"x": _range((1, 3, 48, 32), (4, 3, 48, 320), (8, 3, 48, 960))},
    "ocr_orientation": {"x": _range((1, 3, 48, 192), (4, 3, 48, 192), (8, 3, 48, 192))},
    "silero_vad": _SPEECH,
    "silero_vad_half": _SPEECH,
    "silero_vad_ifless": _SPEECH,
}
