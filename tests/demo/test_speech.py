# SPDX-License-Identifier: Apache-2.0
"""Tests of speech.py: the synthetic sounds, and what a stream carries from chunk to chunk."""

import numpy as np
import pytest

from thirdrail_server.demo import speech
from thirdrail_server.demo.speech import CHUNK_SAMPLES, CONTEXT_SAMPLES, RATE_HZ, Inputs


def test_recording_is_whole_chunks_of_sound_within_range() -> None:
    for segment in speech.recording():
        assert segment.samples.dtype == np.float32
        assert len(segment.samples) % CHUNK_SAMPLES == 0
        assert np.abs(segment.samples).max() <= 1


def test_voice_has_its_pitch_and_a_syllable_rhythm() -> None:
    sound = speech.voice(2 * RATE_HZ, pitch_hz=120)
    spectrum = np.abs(np.fft.rfft(sound))
    # Two seconds: two bins per Hz. Below the second harmonic is only the pitch, moving by 12 %.
    lowest_hz = spectrum[: 2 * 180].argmax() / 2
    assert lowest_hz == pytest.approx(120, rel=0.15)
    loudness = np.abs(sound).reshape(-1, RATE_HZ // 16).mean(axis=1)
    assert loudness[0::4].max() < 0.5 * loudness.max()  # quiet four times a second


def test_tone_is_one_frequency() -> None:
    spectrum = np.abs(np.fft.rfft(speech.tone(RATE_HZ, pitch_hz=440)))
    assert spectrum.argmax() == 440
    assert spectrum[440] > 100 * np.delete(spectrum, 440).max()


def test_chunks_leave_out_a_short_rest() -> None:
    samples = np.arange(2 * CHUNK_SAMPLES + 100, dtype=np.float32)
    found = list(speech.chunks(samples))
    assert [len(chunk) for chunk in found] == [CHUNK_SAMPLES, CHUNK_SAMPLES]
    assert found[1][0] == CHUNK_SAMPLES


class CountingModel:
    """Stands for the model where only its inputs matter: counts the chunks in its state."""

    def __init__(self) -> None:
        self.seen: list[Inputs] = []

    def __call__(self, model: str, inputs: Inputs) -> Inputs:
        assert model == "silero_vad"
        self.seen.append(inputs)
        return {"output": inputs["input"][:, -1:] * 0 + 0.25, "stateN": inputs["state"] + 1}


def test_stream_carries_state_and_the_last_samples() -> None:
    model = CountingModel()
    stream = speech.VoiceStream(model)
    samples = np.arange(3 * CHUNK_SAMPLES, dtype=np.float32)
    assert [stream.probability(chunk) for chunk in speech.chunks(samples)] == [0.25] * 3

    first, second, third = model.seen
    assert first["input"].shape == (1, CONTEXT_SAMPLES + CHUNK_SAMPLES)
    assert not first["input"][0, :CONTEXT_SAMPLES].any()
    assert not first["state"].any()
    start = CHUNK_SAMPLES - CONTEXT_SAMPLES
    assert second["input"][0].tolist() == list(range(start, 2 * CHUNK_SAMPLES))
    assert (second["state"] == 1).all()
    assert (third["state"] == 2).all()
    assert third["sr"].dtype == np.int64
    assert third["sr"].shape == ()
    assert third["sr"] == RATE_HZ
