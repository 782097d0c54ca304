# SPDX-License-Identifier: Apache-2.0
"""Which models the demo serves, where they come from, and the exact bytes they must have."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import onnx


@dataclass(frozen=True, slots=True)
class PinnedFile:
    path: str  # below the repository folder
    member: str  # the file inside the wheel that it comes from
    sha256: str  # of the file in the repository
    derive: Callable[[bytes], bytes] | None = None  # member -> file; None: the same bytes


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel on PyPI of which some files are needed. It is unpacked, never installed."""

    name: str
    version: str
    license: str
    wheel_bytes: int  # about, for the progress display
    files: tuple[PinnedFile, ...]


def magika_labels(config: bytes) -> bytes:
    """Magika's config file -> its labels, one per line, for `label_filename` in config.pbtxt."""
    labels: list[str] = json.loads(config)["target_labels_space"]
    return "".join(f"{label}\n" for label in labels).encode()


def ocr_characters(model: bytes) -> bytes:
    """The ONNX file of a PP-OCR recognizer -> its characters, one per line, from its metadata."""
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    return str(metadata["character"]).encode()


_MAGIKA = "magika/models/standard_v3_3"
_OCR = "rapidocr/models/PP-OCRv6"

PACKAGES: tuple[Package, ...] = (
    Package(
        name="magika",
        version="1.0.3",
        license="Apache-2.0",
        wheel_bytes=16_244_594,
        files=(
            PinnedFile(
                "magika/1/model.onnx",
                f"{_MAGIKA}/model.onnx",
                "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
            ),
            PinnedFile(
                "magika/config.min.json",
                f"{_MAGIKA}/config.min.json",
                "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
            ),
            PinnedFile(
                "magika/labels.txt",
                f"{_MAGIKA}/config.min.json",
                "38af69737498b9b07cd1e84a5bcf6b29fed340edeb717dcc3fa4684eaff0e930",
                derive=magika_labels,
            ),
        ),
    ),
    Package(
        name="rapidocr",
        version="3.10.0",
        license="Apache-2.0",
        wheel_bytes=27_288_134,
        files=(
            PinnedFile(
                "ocr_detection/1/model.onnx",
                f"{_OCR}_det_small.onnx",
                "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
            ),
            PinnedFile(
                "ocr_recognition/1/model.onnx",
                f"{_OCR}_rec_small.onnx",
                "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
            ),
            PinnedFile(
                "ocr_recognition/characters.txt",
                f"{_OCR}_rec_small.onnx",
                "f7aa897ca828a4c7c9e2739c30f9161a33306d532f020bcdb91dcfb664a5507e",
                derive=ocr_characters,
            ),
        ),
    ),
    Package(
        name="silero-vad",
        version="6.2.3",
        license="MIT",
        wheel_bytes=11_317_527,
        files=(
            PinnedFile(
                "silero_vad/1/model.onnx",
                "silero_vad/data/silero_vad.onnx",
                "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            ),
        ),
    ),
)
