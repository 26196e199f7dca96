"""Frames on a clip's time axis: frame k stands for the seconds k / rate to (k + 1) / rate.

Shapes: N rows of a finer series, T frames, F features.
"""

from __future__ import annotations

import math

import numpy as np

_NEAR = 1e-9  # a time this far below a boundary is on it: k / rate * rate is not always k in floating point


def frame_count(samples: int, sampling_rate: float, rate: float) -> int:
    """How many frames a sound has: max(1, round(samples / sampling_rate · rate)), halves upwards.

    What is left behind the last frame is shorter than half a frame, and a last frame has at least half of its sound.
    """
    return max(1, math.floor(samples * rate / sampling_rate + 0.5 + _NEAR))


def frame_of(times_N: np.ndarray, rate: float) -> np.ndarray:
    """The frame k with k / rate <= t < (k + 1) / rate of each time, in seconds; int64 [N]."""
    return np.floor(np.asarray(times_N, np.float64) * rate + _NEAR).astype(np.int64)


def average_by_time(values_NF: np.ndarray, times_N: np.ndarray, rate: float, count: int) -> np.ndarray:
    """The mean of the rows in each of `count` frames, float32 [T, F]; rows stand at their times, which do not fall.

    A frame without a row takes the row that is nearest to its middle, the earlier of two that are equally near. Rows behind the last frame
    count only there. Sums are float64.

    Raises:
        ValueError: there are no rows.
    """
    if not len(values_NF):
        raise ValueError("there are no rows to average")
    times_N = np.asarray(times_N, np.float64)
    frames_N = frame_of(times_N, rate)
    inside = int(np.searchsorted(frames_N, count))  # rows behind the last frame are left out
    out_TF = np.empty((count, values_NF.shape[1]), np.float32)
    filled, starts, sizes = np.unique(frames_N[:inside], return_index=True, return_counts=True)
    if len(filled):
        sums = np.add.reduceat(values_NF[:inside].astype(np.float64), starts, axis=0)
        out_TF[filled] = sums / sizes[:, None]
    empty = np.setdiff1d(np.arange(count), filled)
    if len(empty):
        out_TF[empty] = values_NF[nearest_row(times_N, (empty + 0.5) / rate)]
    return out_TF


def nearest_row(times_N: np.ndarray, wanted_T: np.ndarray) -> np.ndarray:
    """The index of the row that is nearest to each wanted time, the earlier of two that are equally near."""
    right = np.searchsorted(times_N, wanted_T).clip(0, len(times_N) - 1)
    left = (right - 1).clip(0)
    earlier = np.abs(wanted_T - times_N[left]) <= np.abs(times_N[right] - wanted_T) + _NEAR
    return np.where(earlier, left, right)
