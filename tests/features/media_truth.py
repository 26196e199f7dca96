"""What is read from a file, in the terms of what was put into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.features import media_files as made
from trainer.features.media.clip import read_pictures, read_sound
from trainer.features.types import Clip, Sound

LIMIT = 120.0
RATE = 16000
AFTER_CODEC = 0.06  # of loss by a codec: root mean square of the difference, where that of the tone is 0.35


def sound_of(path: Path, start: float | None = None, end: float | None = None, rate: int = RATE) -> Sound:
    sound, notes = read_sound(Clip(path, start, end), rate, LIMIT)
    assert sound is not None
    assert notes == []
    assert sound.samples_n.dtype == np.float32
    assert np.abs(sound.samples_n).max() <= 1
    return sound


def numbers(path: Path, rate: float, start: float | None = None, end: float | None = None) -> list[int]:
    """The numbers of a clip's pictures; black is -1."""
    with read_pictures(Clip(path, start, end), rate, LIMIT) as pictures:
        seen = list(pictures)
        assert len(seen) == pictures.count
        assert [picture.time for picture in seen] == [(k + 0.5) / rate for k in range(len(seen))]
        return [made.number_of(picture.rgb) if picture.rgb.any() else -1 for picture in seen]


def shown(times: list[float], rate: float, count: int, start: float = 0.0) -> list[int]:
    """The truth: the last picture whose time is not after the grid's."""
    return [max(i for i, time in enumerate(times) if time <= start + (k + 0.5) / rate + 1e-9) for k in range(count)]


def true_tones(seconds: float, start: float = 0.0, rate: int = RATE) -> np.ndarray:
    time_n = start + np.arange(round(seconds * rate)) / rate
    frequency_n = made.LOWEST_TONE + made.TONE_STEP * (np.floor(time_n) % 20)
    return 0.5 * np.sin(2 * np.pi * frequency_n * time_n)


def lag(found_n: np.ndarray, true_n: np.ndarray, most: int = 400) -> int:
    """By how many samples the found sound comes later than the true one."""
    n = min(len(found_n), len(true_n))
    size = 1 << (2 * n).bit_length()
    spectrum = np.fft.rfft(found_n[:n], size) * np.conj(np.fft.rfft(true_n[:n], size))
    correlation = np.fft.irfft(spectrum, size)
    shifts = np.arange(-most, most + 1)
    return int(shifts[correlation[shifts].argmax()])
