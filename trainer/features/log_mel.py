"""Logarithms of mel bands, energy and pitch of a sound: signal processing alone, no weights.

Windows of 25 ms, one for every 10 ms or less (a hop): at 16 kHz, 400 samples every 160. Hop j has its middle at (j + 0.5) hops, and belongs to
the feature frame in which its middle is.

Shapes: n samples, J hops, B mel bands, T frames, F features.
"""

from __future__ import annotations

import itertools
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
PITCH_SECONDS = 0.05  # three periods of the lowest pitch
PITCH_UNIT = 100.0  # Hz
VOICED = 0.5  # the least correlation of a window with itself one period later
BLOCK = 3000  # hops that are worked on at once: memory is that of 30 seconds


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
      are voiced. f0 between 60 and 600 Hz by YIN (de Cheveigné and Kawahara 2002, librosa.yin) in windows of 50 ms. YIN always names an f0: a hop
      is voiced where its window, one period later, correlates with itself by at least 0.5 and is not silent. Its fuller form, pYIN, takes
      many times as long.
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
        self.filters_BC = librosa.filters.mel(
            sr=section.sampling_rate, n_fft=self.fft, n_mels=section.bands, fmin=LOWEST_BAND, dtype=np.float64
        )

    def __call__(self, sound: Sound) -> np.ndarray:
        """Features float32 [T, F] of a sound that has samples."""
        samples_n = sound.samples_n
        count = frame_count(len(samples_n), self.sampling_rate, self.rate)
        hops = max(1, -(-(len(samples_n) - self.hop // 2) // self.hop))  # those whose middle is in the sound
        times_J = (np.arange(hops) + 0.5) * self.hop / self.sampling_rate
        parts_J: list[np.ndarray] = [self._mel(samples_n, hops)]
        if self.section.pitch:
            parts_J.append(self._pitch(samples_n, hops))
        out_TF = average_by_time(np.concatenate(parts_J, axis=1), times_J, self.rate, count)
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
        librosa = _librosa()
        out_JB = np.empty((hops, self.section.bands), np.float32)
        for block, padded_n in self._blocks(samples_n, hops, self.fft):
            spectrum = librosa.stft(
                padded_n, n_fft=self.fft, hop_length=self.hop, win_length=self.window, window="hann", center=False
            )
            power = spectrum.real**2 + spectrum.imag**2
            out_JB[block] = np.log(np.maximum(self.filters_BC @ power, POWER_FLOOR)).T
        return out_JB

    def _pitch(self, samples_n: np.ndarray, hops: int) -> np.ndarray:
        """log2(f0 / 100 Hz), 0 where a hop is not voiced, and whether it is; [J, 2]."""
        librosa = _librosa()
        length = round(PITCH_SECONDS * self.sampling_rate)
        out_J2 = np.zeros((hops, 2), np.float32)
        for block, padded_n in self._blocks(samples_n, hops, length):
            f0_J = librosa.yin(
                padded_n,
                fmin=LOWEST_PITCH,
                fmax=HIGHEST_PITCH,
                sr=self.sampling_rate,
                frame_length=length,
                hop_length=self.hop,
                center=False,
            )
            windows_Jn = np.lib.stride_tricks.sliding_window_view(padded_n, length)[:: self.hop]
            voiced_J = _periodic(windows_Jn, np.rint(self.sampling_rate / f0_J).astype(np.int64))
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
        """Blocks of hops, each with the samples of its windows of `length`; silence before and behind the sound."""
        before = length // 2 - self.hop // 2  # of hop 0
        for first in range(0, hops, BLOCK):
            last = min(hops, first + BLOCK)
            start = first * self.hop - before
            stop = (last - 1) * self.hop - before + length
            inside = samples_n[max(start, 0) : max(stop, 0)]
            padded_n = np.zeros(stop - start)  # float64: weak bands beside strong ones lose nothing
            padded_n[max(-start, 0) : max(-start, 0) + len(inside)] = inside
            yield slice(first, last), padded_n


def _periodic(windows_Jn: np.ndarray, periods_J: np.ndarray) -> np.ndarray:
    """Whether each window is like itself one period (samples) later: normalised correlation of what overlaps; bool [J]."""
    length = windows_Jn.shape[1]
    out_J = np.zeros(len(windows_Jn), bool)
    for period in np.unique(periods_J):
        chosen = periods_J == period
        early, late = windows_Jn[chosen, : length - period], windows_Jn[chosen, period:]
        product, first, second = (
            np.einsum("jn,jn->j", a, b, dtype=np.float64) for a, b in ((early, late), (early, early), (late, late))
        )
        loud = np.minimum(first, second) > LEVEL_FLOOR**2 * (length - period)
        out_J[chosen] = loud & (product >= VOICED * np.sqrt(first * second))
    return out_J


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise ValueError("log-mel features need librosa, which is not installed: pip install 'egmf-trainer[clips]'") from error
    return librosa
