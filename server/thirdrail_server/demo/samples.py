# SPDX-License-Identifier: Apache-2.0
"""Files of many types: text files kept in texts/, and binary files made here."""

import gzip
import io
import sqlite3
import tarfile
import wave
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from thirdrail_server.demo import page, speech

TEXT_FOLDER = Path(__file__).parent / "texts"
ZIP_DATE = (2026, 4, 17, 8, 0, 0)
EXECUTABLE_BYTES_MAX = 1 << 20  # the start and end of this much are enough


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    content: bytes
    label: str  # what Magika should call it


TEXT_LABELS = {
    "README.md": "markdown",
    "parts.json": "json",
    "readings.csv": "csv",
    "index.html": "html",
    "style.css": "css",
    "live.js": "javascript",
    "schema.sql": "sql",
    "backup.sh": "shell",
    "breaker.go": "go",
    "relay.c": "c",
    "Feeder.java": "java",
    "phase.rs": "rust",
    "service.yaml": "yaml",
    "plant.xml": "xml",
}


def samples() -> list[Sample]:
    """Some hundred kilobytes in all, made anew on each call."""
    texts = [
        Sample(name, (TEXT_FOLDER / name).read_bytes(), label)
        for name, label in TEXT_LABELS.items()
    ]
    python = Sample("samples.py", Path(__file__).read_bytes(), "python")
    binaries = [Sample(name, make(), label) for name, label, make in BINARIES]
    return [python, *texts, *binaries]


def _image(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(page.render()).save(buffer, file_format)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in TEXT_LABELS:
            entry = zipfile.ZipInfo(name, ZIP_DATE)  # not the file's own: the same bytes each time
            archive.writestr(entry, (TEXT_FOLDER / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in TEXT_LABELS:
            content = (TEXT_FOLDER / name).read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _gzip() -> bytes:
    return gzip.compress((TEXT_FOLDER / "readings.csv").read_bytes(), mtime=0)


def _sqlite() -> bytes:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript((TEXT_FOLDER / "schema.sql").read_text())
        return database.serialize()
    finally:
        database.close()


def _wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(speech.RATE_HZ)
        loudness = speech.voice(speech.RATE_HZ, pitch_hz=120) * np.iinfo(np.int16).max
        writer.writeframes(loudness.astype("<i2").tobytes())
    return buffer.getvalue()


def _numpy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, speech.noise(4096))
    return buffer.getvalue()


def _executable() -> bytes:
    """The running Python's own: an ELF file on every Linux."""
    with Path("/proc/self/exe").open("rb") as file:
        return file.read(EXECUTABLE_BYTES_MAX)


BINARIES: tuple[tuple[str, str, Callable[[], bytes]], ...] = (
    ("page.png", "png", lambda: _image("PNG")),
    ("page.jpg", "jpeg", lambda: _image("JPEG")),
    ("page.gif", "gif", lambda: _image("GIF")),
    ("page.pdf", "pdf", lambda: _image("PDF")),
    ("texts.zip", "zip", _zip),
    ("texts.tar", "tar", _tar),
    ("readings.csv.gz", "gzip", _gzip),
    ("parts.db", "sqlite", _sqlite),
    ("voice.wav", "wav", _wav),
    ("noise.npy", "npy", _numpy),
    ("python", "elf", _executable),
)
