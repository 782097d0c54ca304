# SPDX-License-Identifier: Apache-2.0
"""The demo's three jobs: name the types of files, read a page, find the voices in a recording.

Each sends its inputs through the server and returns what came back beside what was expected.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from thirdrail.requests import Result
from thirdrail_server.demo import page, samples, speech
from thirdrail_server.demo.content_types import MagikaConfig, Tokens, content_type, tokens
from thirdrail_server.demo.speech import SPEECH_PROBABILITY_MIN, Segment, VoiceStream
from thirdrail_server.demo.stopwatch import Stopwatch
from thirdrail_server.demo.text_boxes import Box, Pixels, detection_input, find_boxes
from thirdrail_server.demo.text_lines import (
    ReadText,
    alphabet,
    batches_by_width,
    decode,
    recognition_input,
)

DETECTION_REPEATS = 5
RECOGNITION_ROWS_MAX = 4  # an answer has 6 MB per line; gRPC carries at most 64 MiB
NOTHING = "(nothing)"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was sent, and whether the right thing came back."""

    subject: str
    expected: str
    got: str
    note: str
    is_ok: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    title: str
    subject_heading: str
    note_heading: str
    checks: tuple[Check, ...]


Job = Callable[[Stopwatch, Path], Outcome]


def name_file_types(stopwatch: Stopwatch, repository: Path) -> Outcome:
    """Magika: files one by one, all in one request, and one by one from several threads at once."""
    config = MagikaConfig.from_json((repository / "magika" / "config.min.json").read_text())
    files = samples.samples()
    rows = [tokens(file.content, config) for file in files]

    def ask(batch: Sequence[Tokens], kind: str) -> Result:
        return stopwatch.infer("magika", {"bytes": np.stack(batch)}, kind=kind)

    def label_of(answer: Result, row: int = 0) -> str:
        return content_type(answer["target_label"][row], config).label

    checks = []
    for file, row in zip(files, rows, strict=True):
        found = content_type(ask([row], "one file")["target_label"][0], config)
        is_ok = found.label == file.label and found.is_sure
        checks.append(Check(file.name, file.label, found.label, f"{found.score:.0%}", is_ok))

    expected = [file.label for file in files]
    together = ask(rows, f"{len(rows)} files")
    got = [label_of(together, row) for row in range(len(rows))]
    checks.append(_same_labels("all in one request", expected, got, ""))

    with ThreadPoolExecutor(max_workers=len(rows)) as threads:
        answers = list(threads.map(lambda row: ask([row], "one file, all at once"), rows))
    largest = max(answer.timing.batch_rows for answer in answers)
    note = f"up to {largest} in a batch" if largest else "not batched"
    checks.append(_same_labels("all at once", expected, list(map(label_of, answers)), note))
    return Outcome("What type is this file? (Magika)", "file", "confidence", tuple(checks))


def _same_labels(subject: str, expected: list[str], got: list[str], note: str) -> Check:
    right = sum(e == g for e, g in zip(expected, got, strict=True))
    return Check(subject, f"{len(expected)} right", f"{right} right", note, right == len(expected))


def read_page(stopwatch: Stopwatch, repository: Path) -> Outcome:
    """PP-OCR: find the lines of a rendered page, read each, compare with what was rendered."""
    characters = alphabet((repository / "ocr_recognition" / "characters.txt").read_text("utf-8"))
    pixels = page.render()
    boxes = _detect(stopwatch, pixels)
    texts = _recognise(stopwatch, pixels, boxes, characters)
    checks = []
    for number, (line, read) in enumerate(zip_longest(page.LINES, texts), start=1):
        expected = line.text if line else NOTHING
        got = read.text if read else NOTHING
        note = f"{read.confidence:.0%}" if read else ""
        checks.append(Check(f"{number}", expected, got, note, got == expected))
    return Outcome("What does this page say? (PP-OCR)", "line", "confidence", tuple(checks))


def _detect(stopwatch: Stopwatch, pixels: Pixels) -> list[Box]:
    inputs = {"x": detection_input(pixels)}
    for _ in range(DETECTION_REPEATS):
        answer = stopwatch.infer("ocr_detection", inputs, kind="one page")
    height, width = pixels.shape[:2]
    return find_boxes(answer["fetch_name_0"][0, 0], height, width)


def _recognise(
    stopwatch: Stopwatch, pixels: Pixels, boxes: Sequence[Box], characters: Sequence[str]
) -> list[ReadText]:
    strips = [recognition_input(pixels, box) for box in boxes]
    texts: dict[int, ReadText] = {}
    for batch in batches_by_width(strips, RECOGNITION_ROWS_MAX):
        inputs = {"x": np.stack([strips[index] for index in batch])}
        answer = stopwatch.infer("ocr_recognition", inputs, kind="a batch of lines")
        for index, row in zip(batch, answer["fetch_name_0"], strict=True):
            texts[index] = decode(row, characters)
    return [texts[index] for index in range(len(strips))]


def find_voices(stopwatch: Stopwatch, repository: Path) -> Outcome:
    """Silero VAD: a recording in chunks of 32 ms; the model's state goes along with each call."""
    stream = VoiceStream(
        lambda model, inputs: stopwatch.infer(model, inputs, kind="32 ms of sound")
    )
    checks = []
    for segment in speech.recording():
        probabilities = [stream.probability(chunk) for chunk in speech.chunks(segment.samples)]
        checks.append(_voice_check(segment, probabilities))
    return Outcome(
        "Is somebody speaking? (Silero VAD)", "sound", "probability, time voiced", tuple(checks)
    )


def _voice_check(segment: Segment, probabilities: list[float]) -> Check:
    """By majority: the model needs some chunks to notice that a voice has begun or ended."""
    voiced = sum(each > SPEECH_PROBABILITY_MIN for each in probabilities) / len(probabilities)
    median = float(np.median(probabilities))
    is_speech = median > SPEECH_PROBABILITY_MIN
    return Check(
        subject=f"{segment.name}, {len(segment.samples) / speech.RATE_HZ:.0f} s",
        expected="speech" if segment.is_speech else "no speech",
        got="speech" if is_speech else "no speech",
        note=f"{median:.0%}, {voiced:.0%}",
        is_ok=is_speech == segment.is_speech,
    )


JOBS: tuple[Job, ...] = (name_file_types, read_page, find_voices)
