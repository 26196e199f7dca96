"""Features of many frames a second -> fewer: means over windows of equal duration.

Shapes: T frames, N windows, F features of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from trainer.data.preparation.faults import DataError
from trainer.data.preparation.frames import FeatureSequence

Rate = TypeVar("Rate", float, "float | None")
ROUNDING = 1e-9  # of a frame: less of one in a window is rounding


class Resampling(NamedTuple):
    """Streams of more than `max_rate` frames a second become ones of `max_rate`; `rates` are those that they have, None: unknown."""

    max_rate: float
    rates: Mapping[str, float | None]

    def __call__(self, streams: Mapping[str, FeatureSequence | None]) -> dict[str, FeatureSequence | None]:
        """The streams of one sample.

        Raises:
            DataError: a stream of unknown rate.
        """
        return {name: None if stream is None else self._of(name, stream) for name, stream in streams.items()}

    def _of(self, name: str, stream: FeatureSequence) -> FeatureSequence:
        rate = self.rates.get(name)
        if rate is None:
            raise DataError(
                f"max_rate={self.max_rate:g} needs the rate of {name}, which the source does not say: give it (key rate of own "
                f"samples; of published files --rate {name}=N), or prepare without max_rate"
            )
        return resample(stream, rate, self.max_rate)


def check_max_rate(max_rate: float | None) -> None:
    """Raises DataError where `max_rate` is no number of frames a second."""
    if max_rate is not None and not (math.isfinite(max_rate) and max_rate > 0):
        raise DataError(f"max_rate is a number of frames a second above 0, not {max_rate:g}")


def stated_rates(found: Mapping[str, float | None], given: Mapping[str, float]) -> dict[str, float | None]:
    """The rates of a source's streams: those that it says, and those that the user says where it says none.

    Raises:
        DataError: all that is wrong with what the user says.
    """
    faults = []
    for name, rate in given.items():
        said = found.get(name)
        if name not in found:
            faults.append(f"no stream {name}, only {' and '.join(found)}")
        elif not (math.isfinite(rate) and rate > 0):
            faults.append(f"the rate of {name} is a number of frames a second above 0, not {rate:g}")
        elif said is not None and said != rate:
            faults.append(f"the source says that its {name} has {said:g} frames a second, not {rate:g}")
    if faults:
        raise DataError("\n".join(faults))
    return {name: given.get(name, rate) for name, rate in found.items()}


def resampled_rate(rate: Rate, max_rate: float | None) -> Rate:
    """What a stream of `rate` frames a second has after resampling to `max_rate` at most."""
    return rate if rate is None or max_rate is None else min(rate, max_rate)


def resample(stream: FeatureSequence, rate: float, max_rate: float) -> FeatureSequence:
    """A clip of `rate` frames a second as one of `max_rate`, where that is less: window n lasts from n / max_rate to (n + 1) / max_rate
    seconds of the clip, the last to its end at most.

        y_n = sum_t w_nt x_t / sum_t w_nt

    over the frames t that count, w_nt the time that frame t, from t / rate to (t + 1) / rate, shares with window n. A window
    without such a frame does not count. Computed in float64.
    """
    if rate <= max_rate:
        return stream
    values_TF, mask_T, padding = stream
    frames, span = len(values_TF), rate / max_rate
    count = max(1, math.ceil(frames / span - ROUNDING))
    start_T = np.arange(frames)
    window_T = np.minimum((start_T / span).astype(int), count - 1)  # in which a frame begins; it may end in the next
    within_T = np.where(window_T == count - 1, 1.0, np.minimum((window_T + 1) * span - start_T, 1.0))
    counts_T = np.ones(frames) if mask_T is None else mask_T.astype(np.float64)
    total_NF, weight_N = np.zeros((count + 1, values_TF.shape[1])), np.zeros(count + 1)
    for at_T, share_T in ((window_T, within_T * counts_T), (window_T + 1, (1.0 - within_T) * counts_T)):
        np.add.at(weight_N, at_T, share_T)
        np.add.at(total_NF, at_T, share_T[:, None] * values_TF)
    valid_N = weight_N[:count] > ROUNDING
    mean_NF = np.where(valid_N[:, None], total_NF[:count] / np.maximum(weight_N[:count, None], ROUNDING), 0.0)
    return FeatureSequence(mean_NF.astype(np.float32), None if valid_N.all() else valid_N, padding)
