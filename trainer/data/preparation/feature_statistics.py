"""Mean and deviation of every feature over the training frames, by which the encoders standardise audio and video.

Measured over the valid frames of the training split in their published order, float64, in blocks of a fixed number of
frames, whose moments are merged one after another: neither shards nor processes change a bit of the result.

Shapes: T frames, F features of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from trainer.data.preparation.record import FeatureStatistics, StandardisationRecord

if TYPE_CHECKING:
    from trainer.batch import Standardisation

Standardise = Literal["none", "mean", "robust"]
CLIP = 10.0  # standardised values beyond are cut
CONSTANT = 1e-6  # a deviation below this share of the largest magnitude is rounding of float32, no information
SMALLEST = 1e-30  # a deviation below this has no reciprocal that is safe in float32
NORMAL_IQR = 1.3489795003921634  # interquartile range of the standard normal distribution
BLOCK_VALUES = 1 << 18  # of a block of frames
SAMPLE_VALUES = 1 << 25  # of the sample whose quartiles are taken
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def measure(paths: Sequence[Path], widths: Mapping[str, int], mode: Standardise) -> StandardisationRecord:
    """The record's entry: statistics of every modality's features over all valid frames in the Arrow files `paths`; without a
    file (of folds, which are cut later) the mode alone.

    `mean`: mean m and population deviation s. `robust`: besides, the median and the interquartile range / 1.349 (the
    deviation of a normal distribution with these quartiles), from a second pass. A modality without a valid frame has None.
    """
    if not paths:
        return {"mode": mode, "clip": None if mode == "none" else CLIP, "features": {}}
    return measure_frames(lambda name: _frames(paths, name, widths[name]), widths, mode)


def measure_frames(
    frames: Callable[[str], Iterator[np.ndarray]], widths: Mapping[str, int], mode: Standardise
) -> StandardisationRecord:
    """:func:`measure` of the valid frames that `frames(modality)` gives, in arrays [T, F], anew at each call."""
    if mode == "none":
        return {"mode": mode, "clip": None, "features": {}}
    features = {name: _measure(partial(frames, name), width, mode) if width else None for name, width in widths.items()}
    return {"mode": mode, "clip": CLIP, "features": features}


def standardisations(record: StandardisationRecord | None, widths: Mapping[str, int]) -> dict[str, Standardisation]:
    """What the encoders apply, by modality; a modality that is not standardised is absent.

    The centre is the mean (robust: the median), the scale 1 / deviation (robust: 1.349 / IQR; of features whose quartiles
    are equal the mean and 1 / deviation), and 1 for constant features.

    Raises:
        ValueError: statistics that do not fit `widths` or are not finite.
    """
    from trainer.batch import Standardisation  # imports torch

    clip = None if record is None else record["clip"]
    if record is None or clip is None:
        return {}
    check_statistics(record, widths)
    out: dict[str, Standardisation] = {}
    for name, stats in record["features"].items():
        if stats is not None:
            centre_F, spread_F = centre_and_spread(stats)
            out[name] = Standardisation(centre_F.astype(np.float32), (1.0 / spread_F).astype(np.float32), clip)
    return out


def check_statistics(record: StandardisationRecord, widths: Mapping[str, int]) -> None:
    """Refuse what :func:`standardisations` cannot use.

    Raises:
        ValueError: statistics that do not fit `widths` or are not finite.
    """
    for name, stats in record["features"].items():
        if stats is None:
            continue
        centre_F, spread_F = centre_and_spread(stats)
        if centre_F.shape != (widths[name],) or spread_F.shape != centre_F.shape:
            raise ValueError(f"the statistics of {name} are of {len(centre_F)} features instead of {widths[name]}")
        if not (np.isfinite(centre_F).all() and np.isfinite(spread_F).all() and (spread_F > 0).all()):
            raise ValueError(f"the statistics of {name} are not finite or have deviations of 0")


def centre_and_spread(stats: FeatureStatistics) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from each feature, and what it is divided by (1 where it is constant), float64 [F]."""
    centre_F, spread_F = (np.array(stats[key], dtype=np.float64) for key in ("mean", "deviation"))
    if "median" in stats:
        wide_F = np.ones(len(centre_F), dtype=bool)
        wide_F[[*stats["narrow"], *stats["constant"]]] = False
        centre_F[wide_F] = np.array(stats["median"], dtype=np.float64)[wide_F]
        spread_F[wide_F] = np.array(stats["iqr"], dtype=np.float64)[wide_F] / NORMAL_IQR
    spread_F[stats["constant"]] = 1.0
    return centre_F, spread_F


def _measure(frames: Callable[[], Iterator[np.ndarray]], width: int, mode: Standardise) -> FeatureStatistics | None:
    size = max(1, BLOCK_VALUES // width)
    count, mean_F, square_F = 0, np.zeros(width), np.zeros(width)
    low_F, high_F = np.full(width, np.inf), np.full(width, -np.inf)
    for block_TF in _blocks(frames(), size):
        low_F, high_F = np.minimum(low_F, block_TF.min(0)), np.maximum(high_F, block_TF.max(0))
        count, mean_F, square_F = merge(count, mean_F, square_F, block_TF)
    if not count:
        return None
    deviation_F = np.sqrt(square_F / count)
    magnitude_F = np.maximum(np.abs(low_F), np.abs(high_F))
    floor_F = np.maximum(CONSTANT * magnitude_F, SMALLEST)
    constant_F = deviation_F <= floor_F
    stats: FeatureStatistics = {
        "frames": count,
        "mean": mean_F.tolist(),
        "deviation": deviation_F.tolist(),
        "minimum": low_F.tolist(),
        "maximum": high_F.tolist(),
        "constant": np.flatnonzero(constant_F).tolist(),
    }
    if mode == "robust":
        sample_TF = _sample(_blocks(frames(), size), count, width)
        first_F, median_F, third_F = np.quantile(sample_TF, [0.25, 0.5, 0.75], axis=0)
        stats["median"], stats["iqr"] = median_F.tolist(), (third_F - first_F).tolist()
        stats["narrow"] = np.flatnonzero(~constant_F & ((third_F - first_F) / NORMAL_IQR <= floor_F)).tolist()
        stats["sampled"] = len(sample_TF)
    return stats


def merge(count: int, mean_F: np.ndarray, square_F: np.ndarray, block_TF: np.ndarray) -> tuple[int, Any, Any]:
    """Count, mean and sum of squared differences from the mean, with the frames of a block added.

    With the block's n_b, m_b, M_b and d = m_b - m:  m' = m + d n_b / n',  M' = M + M_b + d^2 n n_b / n'.
    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances", (2.1).
    """
    own_F = block_TF.mean(0)
    total, delta_F = count + len(block_TF), own_F - mean_F
    share = len(block_TF) / total
    square_F = square_F + np.square(block_TF - own_F).sum(0) + np.square(delta_F) * (count * share)
    return total, mean_F + delta_F * share, square_F


def _sample(blocks: Iterable[np.ndarray], count: int, width: int) -> np.ndarray:
    """All frames, or as many as SAMPLE_VALUES allows: one of each of equal strata, the same for the same count.

    Which of its stratum follows the multiples of the golden ratio, so that no period of the data is met.
    """
    wanted = min(count, max(1024, SAMPLE_VALUES // width))
    stratum = np.arange(wanted)
    chosen = stratum if wanted == count else np.floor((stratum + stratum * GOLDEN % 1.0) * (count / wanted))
    chosen = np.minimum(chosen.astype(np.int64), count - 1)
    sample_TF, start, filled = np.empty((wanted, width), dtype=np.float32), 0, 0
    for block_TF in blocks:
        stop = int(np.searchsorted(chosen, start + len(block_TF)))
        sample_TF[filled:stop] = block_TF[chosen[filled:stop] - start]
        start, filled = start + len(block_TF), stop
    return sample_TF


def _blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same frames in float64 arrays of `size` frames; the last has the rest."""
    waiting: list[np.ndarray] = []
    free = size
    for part_TF in parts:
        rest_TF = part_TF
        while len(rest_TF):
            waiting.append(rest_TF[:free])
            rest_TF, free = rest_TF[free:], free - len(waiting[-1])
            if not free:
                yield np.concatenate(waiting).astype(np.float64)
                waiting, free = [], size
    if waiting:
        yield np.concatenate(waiting).astype(np.float64)


def _frames(paths: Sequence[Path], name: str, width: int) -> Iterator[np.ndarray]:
    """The valid frames [T, F] of each record batch, in order."""
    for path in paths:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                yield _valid(batch, name, width)


def _valid(batch: pa.RecordBatch, name: str, width: int) -> np.ndarray:
    values, masks = batch.column(name), batch.column(f"{name}_mask")
    offsets = values.offsets.to_numpy()
    flat = values.values.to_numpy(zero_copy_only=True)
    values_TF: np.ndarray = flat[offsets[0] : offsets[-1]].reshape(-1, width)
    if masks.null_count == len(masks):
        return values_TF
    keep_T = np.ones(len(values_TF), dtype=bool)
    starts = (offsets - offsets[0]) // width
    for i in np.flatnonzero(masks.is_valid().to_numpy(zero_copy_only=False)).tolist():
        keep_T[starts[i] : starts[i + 1]] = masks[i].values.to_numpy(zero_copy_only=False)
    return values_TF[keep_T]
