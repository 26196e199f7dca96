"""Logarithms of mel bands, energy and pitch of a sound: signal processing alone, no weights.

Windows of 25 ms, one for every 10 ms or less (a hop): at 16 kHz, 400 samples every 160. Hop j has its middle at (j + 0.5) hops, and belongs to
the feature frame in which its middle is.

Shapes: n samples, J hops, W samples of a window, C frequencies, B mel bands, T frames, F features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.features.recipe import LogMel
from trainer.features.timeline import average_by_time, frame_count
from trainer.features.types import Sound

WINDOW_SECONDS = 0.025
HOPS_A_SECOND = 100
LOWEST_BAND = 50.0  # Hz
POWER_FLOOR = 1e-10  # of a mel band, just below what rounding to 16 bits leaves
LEVEL_FLOOR = 1e-5  # of the root mean square, -100 dB of full scale
LOWEST_PITCH, HIGHEST_PITCH = 60.0, 600.0  # Hz: speech, of children and in excitement too
TROUGH = 0.1  # YIN: the first trough of the normalised difference below it is the period, else the deepest
APERIODIC = 0.5  # the normalised difference from which a hop has no pitch
PITCH_UNIT = 100.0  # Hz
BLOCK = 1000  # hops that are worked on at once: memory is that of ten seconds


def feature_names(section: LogMel) -> tuple[str, ...]:
    """The names of the features, in their order."""
    names = [f"mel {band}" for band in range(section.bands)]
    names += ["log RMS"] * section.energy + ["log2 pitch", "voiced share"] * section.pitch
    return (*names, *["speech"] * (section.speech == "feature"))


class LogMelFeatures:
    """What the recipe kind `log_mel` extracts, without speech activity.

    - Mel bands: power spectrum of the window (Hann), librosa's mel filter bank (Slaney's scale, triangles of equal area) from 50 Hz to half the
      sampling rate, natural logarithm of at least 1e-10; the mean over a frame's hops.
    - log RMS: the natural logarithm of the root mean square of the frame's own samples, of at least 1e-5. Twice the loudness: + ln 2.
    - log2 pitch: the mean of log2(f0 / 100 Hz) over the frame's voiced hops, 0 where there are none; voiced share: the share of its hops that
      are voiced. f0 between 60 and 600 Hz by :func:`yin`.

    Of librosa only the filter bank is used: its functions for spectra and pitch are compiled at their first call, which takes a quarter of a
    minute where nothing of it was kept, in every process that extracts. pYIN takes many times as long as YIN.
    """

    def __init__(self, section: LogMel) -> None:
        librosa = _librosa()
        self.section = section
        self.rate = section.rate
        self.sampling_rate = section.sampling_rate
        self.width = section.bands + section.energy + 2 * section.pitch
        self.hop = section.sampling_rate // HOPS_A_SECOND
        self.window = round(WINDOW_SECONDS * section.sampling_rate)
        self.fft = 1 << (self.window - 1).bit_length()
        self.taper_W = np.hanning(self.window + 1)[:-1]
        self.filters_BC = librosa.filters.mel(
            sr=section.sampling_rate, n_fft=self.fft, n_mels=section.bands, fmin=LOWEST_BAND, dtype=np.float64
        )

    def __call__(self, sound: Sound) -> np.ndarray:
        """Features float32 [T, F] of a sound that has samples."""
        samples_n = sound.samples_n
        count = frame_count(len(samples_n), self.sampling_rate, self.rate)
        hops = max(1, -(-(len(samples_n) - self.hop // 2) // self.hop))  # those whose middle is in the sound
        times_J = (np.arange(hops) + 0.5) * self.hop / self.sampling_rate
        parts = [self._mel(samples_n, hops)]
        if self.section.pitch:
            parts.append(self._pitch(samples_n, hops))
        out_TF = average_by_time(np.concatenate(parts, axis=1), times_J, self.rate, count)
        columns = [out_TF[:, : self.section.bands]]
        if self.section.energy:
            columns.append(self._energy(samples_n, count))
        if self.section.pitch:
            total_T, share_T = out_TF[:, -2], out_TF[:, -1]  # means over all hops, 0 where unvoiced
            pitch_T = np.divide(total_T, share_T, out=np.zeros_like(total_T), where=share_T > 0)
            columns += [pitch_T[:, None], share_T[:, None]]
        return np.concatenate(columns, axis=1)

    def _mel(self, samples_n: np.ndarray, hops: int) -> np.ndarray:
        """[J, B]."""
        out_JB = np.empty((hops, self.section.bands))
        for block, windows_JW in self._blocks(samples_n, hops, self.window):
            spectrum_JC = np.fft.rfft(windows_JW * self.taper_W, self.fft)
            power_JC = spectrum_JC.real**2 + spectrum_JC.imag**2
            out_JB[block] = np.log(np.maximum(power_JC @ self.filters_BC.T, POWER_FLOOR))
        return out_JB

    def _pitch(self, samples_n: np.ndarray, hops: int) -> np.ndarray:
        """log2(f0 / 100 Hz), 0 where a hop is not voiced, and whether it is; [J, 2]."""
        out_J2 = np.zeros((hops, 2))
        for block, windows_JL in self._blocks(samples_n, hops, yin_length(self.sampling_rate)):
            f0_J, aperiodic_J = yin(windows_JL, self.sampling_rate)
            loud_J = np.square(windows_JL).mean(axis=1) > LEVEL_FLOOR**2
            voiced_J = loud_J & (aperiodic_J < APERIODIC)
            out_J2[block, 0] = np.where(voiced_J, np.log2(f0_J / PITCH_UNIT), 0.0)
            out_J2[block, 1] = voiced_J
        return out_J2

    def _energy(self, samples_n: np.ndarray, count: int) -> np.ndarray:
        """[T, 1]."""
        # Sample i has its middle at (i + 0.5) / sampling_rate; each frame has at least half of its samples, the only one at least one.
        edges = np.ceil(np.arange(count + 1) * (self.sampling_rate / self.rate) - 0.5 - 1e-6).astype(np.int64)
        edges = edges.clip(0, len(samples_n))
        power_T = [np.square(samples_n[a:b], dtype=np.float64).mean() for a, b in itertools.pairwise(edges.tolist())]
        return np.log(np.maximum(np.sqrt(power_T), LEVEL_FLOOR)).astype(np.float32)[:, None]

    def _blocks(self, samples_n: np.ndarray, hops: int, length: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of hops with their windows of `length` samples, float64, around the hops' middles; silence before and behind the sound."""
        before = length // 2 - self.hop // 2  # of hop 0
        for first in range(0, hops, BLOCK):
            last = min(hops, first + BLOCK)
            start = first * self.hop - before
            stop = (last - 1) * self.hop - before + length
            inside = samples_n[max(start, 0) : max(stop, 0)]
            padded_n = np.zeros(stop - start)
            padded_n[max(-start, 0) : max(-start, 0) + len(inside)] = inside
            yield slice(first, last), np.lib.stride_tricks.sliding_window_view(padded_n, length)[:: self.hop]


def yin_length(sampling_rate: int) -> int:
    """The samples that :func:`yin` needs: two periods of the lowest pitch, and the longest period (50 ms together)."""
    return 3 * math.ceil(sampling_rate / LOWEST_PITCH) + 1


def yin(windows_JL: np.ndarray, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The fundamental frequency of each window in Hz, and how far it is from periodic; [J] each.

    YIN (de Cheveigné and Kawahara 2002, steps 2 to 5): with W two periods of the lowest pitch, the difference
    d(p) = Σ_{i<W} (x_i - x_{i+p})², normalised d'(p) = d(p) · p / Σ_{q<=p} d(q). The period is the first trough of d' below 0.1, else its least
    value, refined by a parabola through d. d' at the period is 0 for a periodic sound and about 1 for noise. librosa 0.11 has no such
    measure, and its d, which leaves an energy out, lowers long periods by one per cent.

    Shapes: L samples (:func:`yin_length`), P periods in samples from 0 on.
    """
    longest = math.ceil(sampling_rate / LOWEST_PITCH)
    shortest = math.floor(sampling_rate / HIGHEST_PITCH)
    window = windows_JL.shape[1] - longest - 1
    size = 1 << (windows_JL.shape[1] - 1).bit_length()
    spectrum_JC = np.fft.rfft(windows_JL, size)
    head_JC = np.fft.rfft(windows_JL[:, :window], size)
    product_JP = np.fft.irfft(spectrum_JC * head_JC.conj(), size)[:, : longest + 2]  # Σ_{i<W} x_i x_{i+p}
    sums_JL = np.cumsum(np.pad(np.square(windows_JL), ((0, 0), (1, 0))), axis=1)
    power_JP = sums_JL[:, window : window + longest + 2] - sums_JL[:, : longest + 2]  # Σ_{i<W} x_{i+p}²
    difference_JP = np.maximum(power_JP[:, :1] + power_JP - 2 * product_JP, 0)
    total_JP = np.cumsum(difference_JP[:, 1:], axis=1)
    periods_P = np.arange(1, longest + 2)
    normal_JP = np.ones_like(difference_JP)
    np.divide(difference_JP[:, 1:] * periods_P, total_JP, out=normal_JP[:, 1:], where=total_JP > 0)

    inner_JP = normal_JP[:, shortest : longest + 1]
    trough_JP = (inner_JP < TROUGH) & (inner_JP < normal_JP[:, shortest - 1 : longest])
    trough_JP &= inner_JP <= normal_JP[:, shortest + 1 : longest + 2]
    place_J = np.where(trough_JP.any(axis=1), trough_JP.argmax(axis=1), inner_JP.argmin(axis=1)) + shortest
    rows = np.arange(len(place_J))
    before_J, here_J, after_J = (difference_JP[rows, place_J + step] for step in (-1, 0, 1))
    bend_J = before_J - 2 * here_J + after_J
    shift_J = np.divide(before_J - after_J, 2 * bend_J, out=np.zeros_like(bend_J), where=bend_J > 0).clip(-0.5, 0.5)
    return sampling_rate / (place_J + shift_J), normal_JP[rows, place_J]


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise ValueError(
            "log-mel features need librosa, which is not installed: pip install 'egmf-trainer[clips]'"
        ) from error
    return librosa
