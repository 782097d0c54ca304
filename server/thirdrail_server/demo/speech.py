# SPDX-License-Identifier: Apache-2.0
"""Silero VAD: a synthetic recording, and how it is streamed to the model chunk by chunk.

The model keeps no memory of its own: a caller sends the state that the last answer gave back, and
repeats the last 64 samples in front of the next 512. So any server, and any instance of the model,
can go on with any stream.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]  # mono, -1 to 1
Inputs = Mapping[str, npt.NDArray[Any]]

RATE_HZ = 16_000
CHUNK_SAMPLES = 512  # 32 ms
CONTEXT_SAMPLES = 64
SPEECH_PROBABILITY_MIN = 0.5

# The first three resonances of the throat for a, e, i, o, u, in Hz: what makes a tone a vowel.
VOWEL_FORMANTS_HZ = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]]
)
FORMANT_WIDTHS_HZ = (60, 90, 140)
FORMANT_GAINS = (1.0, 0.6, 0.3)
SYLLABLES_HZ = 4
HARMONICS = 40


@dataclass(frozen=True, slots=True)
class Segment:
    name: str
    is_speech: bool
    samples: Samples


def recording() -> tuple[Segment, ...]:
    """Segments to be played one after the other, some with a voice and some without."""
    return (
        Segment("silence", False, np.zeros(_whole_chunks(1.0), dtype=np.float32)),
        Segment("a voice, 120 Hz", True, voice(_whole_chunks(2.0), pitch_hz=120)),
        Segment("noise", False, noise(_whole_chunks(2.0))),
        Segment("a voice, 190 Hz", True, voice(_whole_chunks(2.0), pitch_hz=190)),
        Segment("a steady tone", False, tone(_whole_chunks(2.0), pitch_hz=440)),
    )


def voice(count: int, *, pitch_hz: float) -> Samples:
    """Babble: a buzz of moving pitch, shaped into four vowels a second."""
    seconds = np.arange(count) / RATE_HZ
    pitch = pitch_hz * (1 + 0.12 * np.sin(2 * np.pi * 0.7 * seconds))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    formants = _formants(seconds)
    sound = np.zeros(count)
    for harmonic in range(1, HARMONICS + 1):
        resonance = np.zeros(count)
        for formant, width, gain in zip(formants, FORMANT_WIDTHS_HZ, FORMANT_GAINS, strict=True):
            resonance += gain / (1 + ((harmonic * pitch - formant) / width) ** 2)
        sound += resonance / harmonic**0.5 * np.sin(harmonic * phase)
    sound *= np.minimum(1, 1.3 * np.sin(np.pi * SYLLABLES_HZ * seconds) ** 2)
    return _samples(0.5 * sound / np.abs(sound).max())


def noise(count: int) -> Samples:
    return _samples(np.random.default_rng(seed=0).normal(scale=0.05, size=count))


def tone(count: int, *, pitch_hz: float) -> Samples:
    return _samples(0.3 * np.sin(2 * np.pi * pitch_hz * np.arange(count) / RATE_HZ))


class VoiceStream:
    """One stream of audio through the model: holds what has to be carried from chunk to chunk."""

    def __init__(self, infer: Callable[[str, Inputs], Inputs]) -> None:
        self._infer = infer
        self._state = np.zeros((2, 1, 128), dtype=np.float32)
        self._context = np.zeros(CONTEXT_SAMPLES, dtype=np.float32)

    def probability(self, chunk: Samples) -> float:
        """The probability, 0 to 1, that the next CHUNK_SAMPLES samples have a voice in them."""
        assert chunk.shape == (CHUNK_SAMPLES,)
        samples = np.concatenate([self._context, chunk])
        answer = self._infer(
            "silero_vad",
            {"input": samples[np.newaxis], "state": self._state, "sr": np.array(RATE_HZ)},
        )
        self._state = np.asarray(answer["stateN"])
        self._context = chunk[-CONTEXT_SAMPLES:]
        return float(answer["output"][0, 0])


def chunks(samples: Samples) -> Iterator[Samples]:
    """Whole chunks of [CHUNK_SAMPLES]; a shorter rest is left out."""
    for start in range(0, len(samples) - CHUNK_SAMPLES + 1, CHUNK_SAMPLES):
        yield samples[start : start + CHUNK_SAMPLES]


def _samples(sound: npt.NDArray[np.float64]) -> Samples:
    return sound.astype(np.float32)


def _whole_chunks(seconds: float) -> int:
    return round(seconds * RATE_HZ / CHUNK_SAMPLES) * CHUNK_SAMPLES


def _formants(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The resonances at each time, [3, samples], gliding from one syllable's middle to the next."""
    syllables = np.arange(int(seconds[-1] * SYLLABLES_HZ) + 2)
    targets = VOWEL_FORMANTS_HZ[syllables % len(VOWEL_FORMANTS_HZ)]
    beats = seconds * SYLLABLES_HZ
    return np.stack([np.interp(beats, syllables + 0.5, column) for column in targets.T])
