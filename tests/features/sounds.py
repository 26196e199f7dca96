"""Sounds whose features are known, and speech by espeak-ng, for the tests of sound."""

from __future__ import annotations

import shutil
import subprocess
import wave
from math import gcd
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import resample_poly

from trainer.features.types import Sound


def tone(frequency: float, seconds: float, level: float = 0.3, rate: int = 16000) -> Sound:
    """A sine of one frequency and amplitude."""
    times = np.arange(round(seconds * rate)) / rate
    return Sound((level * np.sin(2 * np.pi * frequency * times)).astype(np.float32), rate)


def noise(seconds: float, level: float = 0.1, seed: int = 0, rate: int = 16000) -> Sound:
    """White noise of one root mean square."""
    return Sound(np.random.default_rng(seed).normal(0, level, round(seconds * rate)).astype(np.float32), rate)


def silence(seconds: float, rate: int = 16000) -> Sound:
    return Sound(np.zeros(round(seconds * rate), np.float32), rate)


def joined(*sounds: Sound) -> Sound:
    return Sound(np.concatenate([sound.samples_n for sound in sounds]), sounds[0].sampling_rate)


def say(text: str, folder: Path, voice: str = "en", rate: int = 16000) -> Sound:
    """What espeak-ng says, resampled."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng (Debian package of that name)")
    path = folder / "said.wav"
    subprocess.run(["espeak-ng", "-v", voice, "-w", str(path), text], check=True)
    with wave.open(str(path)) as file:
        found = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    shared = gcd(found, rate)
    return Sound(resample_poly(samples, rate // shared, found // shared).astype(np.float32), rate)


def pooled(own: np.ndarray, middles: np.ndarray, rate: float, count: int) -> np.ndarray:
    """Means of the frames whose middle is in each window, else the nearest frame, by a loop."""
    rows = []
    for k in range(count):
        inside = [i for i, time in enumerate(middles) if k / rate - 1e-9 <= time < (k + 1) / rate - 1e-9]
        rows.append(own[inside].mean(0) if inside else own[np.abs(middles - (k + 0.5) / rate).argmin()])
    return np.array(rows)
