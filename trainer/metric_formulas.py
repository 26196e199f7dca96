"""The formulas of the metrics: each a function of sums over samples, so that it serves any weights of the samples.

Legend: M samples that count, C classes or labels, K columns, B resamples. Undefined is nan, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.label_sets import MOST_LABELS, decode_sets

INVALID = -100  # the class of an invalid prediction: no truth has it
_FLAT = 1e-12  # share of the variance over all samples below which a resample's values are constant


@dataclass(frozen=True)
class Terms:
    """A metric as a function of sums over samples.

    `columns`: K arrays [M], booleans where they are counted. `value`: the metric from their K sums, each an array of one
    shape, () or [B]; nan where undefined. `whole`: the metric where every sample counts once, of formulas for which a
    library's result differs from `value` by rounding.
    """

    columns: Sequence[np.ndarray]
    value: Callable[..., np.ndarray]
    whole: Callable[[], float] | None = None


Formula = Callable[[np.ndarray, np.ndarray], Terms]  # truth [M], prediction [M]: classes, or float64 numbers


def accuracy(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Σ [t = p] / M."""
    return Terms([_each(truth), truth == guess], lambda count, hits: hits / count)


def weighted_f1(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Σ_c (true_c / M) · F1_c; scikit-learn's `average="weighted"`."""
    return _f1(truth, guess, weigh=lambda true_C, predicted_C: true_C)


def macro_f1(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """The mean of F1_c over the classes that occur in truth or prediction; scikit-learn's `average="macro"`."""
    return _f1(truth, guess, weigh=lambda true_C, predicted_C: (true_C + predicted_C > 0).astype(float))


def _f1(truth: np.ndarray, guess: np.ndarray, weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Terms:
    """The weighted mean of F1_c = 2 hits_c / (true_c + predicted_c). INVALID is predicted, but averaged in nowhere."""
    classes = np.setdiff1d(np.union1d(truth, guess), [INVALID])
    true_CM, predicted_CM = (values == classes[:, None] for values in (truth, guess))
    if not len(classes):
        return _undefined(truth)
    return Terms([*true_CM, *predicted_CM, *(true_CM & predicted_CM)], _mean_f1(weigh))


def _mean_f1(weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """The weighted mean of F1_c from the sums of truths, predictions and hits of C classes."""

    def value(*sums: np.ndarray) -> np.ndarray:
        true_C, predicted_C, hits_C = np.split(np.stack(sums, axis=-1), 3, axis=-1)
        f1_C = np.where(true_C + predicted_C > 0, 2 * hits_C / (true_C + predicted_C), 0.0)
        weight_C = weigh(true_C, predicted_C)
        return np.asarray((f1_C * weight_C).sum(-1) / weight_C.sum(-1))

    return value


def macro_recall(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """The mean of hits_c / true_c over the classes that occur in the truth; scikit-learn's `balanced_accuracy_score`."""
    classes = np.unique(truth)
    true_CM = truth == classes[:, None]

    def value(*sums: np.ndarray) -> np.ndarray:
        true_C, hits_C = np.split(np.stack(sums, axis=-1), 2, axis=-1)
        recall_C = np.where(true_C > 0, hits_C / true_C, 0.0)
        return np.asarray(recall_C.sum(-1) / (true_C > 0).sum(-1))

    if not len(classes):
        return _undefined(truth)
    return Terms([*true_CM, *(true_CM & (guess == truth))], value)


def _members(values: np.ndarray) -> np.ndarray:
    """[M, C + 1]: which labels each set has. The last column is that of invalid predictions, which have no other."""
    member_MC = decode_sets(np.where(values == INVALID, 0.0, values), MOST_LABELS)
    return np.concatenate([member_MC, (values == INVALID)[:, None]], axis=1)


def set_accuracy(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Σ [T = P] / M over sets of labels; scikit-learn's `accuracy_score` of indicator matrices."""
    return accuracy(truth, guess)


def jaccard(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Mean of |T ∩ P| / |T ∪ P| over samples, 1 where both sets are empty."""
    true_MC, guess_MC = _members(truth), _members(guess)
    union_M = (true_MC | guess_MC).sum(1)
    share_M = np.where(union_M > 0, (true_MC & guess_MC).sum(1) / np.maximum(union_M, 1), 1.0)
    return Terms([_each(truth), share_M], lambda count, share: share / count)


def micro_f1_of_sets(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """2 Σ |T ∩ P| / Σ (|T| + |P|); scikit-learn's `average="micro"`. An invalid prediction is one wrong label."""
    true_MC, guess_MC = _members(truth), _members(guess)
    columns = [values.sum(1).astype(np.float64) for values in (true_MC & guess_MC, true_MC, guess_MC)]
    return Terms(columns, lambda hits, true, predicted: 2 * hits / (true + predicted))


def macro_f1_of_sets(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """The mean of F1_c = 2 hits_c / (true_c + predicted_c) over the labels that occur in truth or prediction."""
    return _f1_of_sets(truth, guess, weigh=lambda true_C, predicted_C: (true_C + predicted_C > 0).astype(float))


def weighted_f1_of_sets(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Σ_c true_c F1_c / Σ_c true_c; scikit-learn's `average="weighted"` of indicator matrices."""
    return _f1_of_sets(truth, guess, weigh=lambda true_C, predicted_C: true_C)


def _f1_of_sets(truth: np.ndarray, guess: np.ndarray, weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Terms:
    true_MC, guess_MC = (_members(values)[:, :-1] for values in (truth, guess))
    occurs_C = (true_MC | guess_MC).any(0)
    if not occurs_C.any():
        return _undefined(truth)
    true_CM, predicted_CM = true_MC[:, occurs_C].T, guess_MC[:, occurs_C].T
    return Terms([*true_CM, *predicted_CM, *(true_CM & predicted_CM)], _mean_f1(weigh))


def mean_absolute_error(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Σ |t − p| / M."""
    return Terms([_each(truth), np.abs(truth - guess)], lambda count, error: error / count)


def root_mean_squared_error(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """√(Σ (t − p)² / M)."""
    return Terms([_each(truth), (truth - guess) ** 2], lambda count, error: np.sqrt(error / count))


def pearson(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Pearson's r; undefined where truth or prediction is constant in float32, or fewer than two samples count."""
    if _constant(truth) or _constant(guess):
        return _undefined(truth)
    t_M, p_M = ((values - values.mean()) / values.std() for values in (truth, guess))

    def value(count: np.ndarray, *sums: np.ndarray) -> np.ndarray:
        t, p, tt, pp, tp = (total / count for total in sums)
        spread = _if_varied(tt - t**2) * _if_varied(pp - p**2)
        return np.asarray(np.clip((tp - t * p) / np.sqrt(spread), -1, 1))

    def whole() -> float:
        from scipy.stats import pearsonr  # slow to import, and this file is imported by all that knows tasks

        return float(pearsonr(truth, guess).statistic)

    return Terms([_each(truth), t_M, p_M, t_M**2, p_M**2, t_M * p_M], value, whole)


def concordance(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """Lin's CCC = 2 cov(t, p) / (var t + var p + (mean t − mean p)²), moments divided by M.

    Undefined where the truth is constant in float32; 0 where the prediction alone is. Source: Lin 1989, Biometrics 45(1).
    """
    if _constant(truth):
        return _undefined(truth)
    t, p = truth - truth.mean(), guess - truth.mean()  # the same shift, which leaves CCC as it is
    variance = (t**2).mean()

    def value(count: np.ndarray, *sums: np.ndarray) -> np.ndarray:
        t, p, tt, pp, tp = (total / count for total in sums)
        spread = tt - t**2
        shared = 2 * (tp - t * p) / (spread + (pp - p**2) + (t - p) ** 2)
        return np.where(spread > _FLAT * variance, shared, np.nan)

    return Terms([_each(truth), t, p, t**2, p**2, t * p], value)


def r2(truth: np.ndarray, guess: np.ndarray) -> Terms:
    """1 − Σ (t − p)² / Σ (t − mean t)²; undefined where the truth is constant in float32."""
    if _constant(truth):
        return _undefined(truth)
    t = truth - truth.mean()  # the resample's own mean is near
    variance = (t**2).mean()

    def value(count: np.ndarray, t: np.ndarray, tt: np.ndarray, residual: np.ndarray) -> np.ndarray:
        spread = tt - t**2 / count
        return np.asarray(1 - residual / np.where(spread > _FLAT * variance * count, spread, np.nan))

    return Terms([_each(truth), t, t**2, (truth - guess) ** 2], value)


def _each(values: np.ndarray) -> np.ndarray:
    """A column whose sum is the number of samples."""
    return np.ones(len(values), dtype=bool)


def _undefined(values: np.ndarray) -> Terms:
    return Terms([_each(values)], lambda count: np.full(np.shape(count), np.nan))


def _constant(values: np.ndarray) -> bool:
    """Whether all values are one in float32; so are none and a single one."""
    return len(np.unique(values.astype(np.float32))) < 2


def _if_varied(variance: np.ndarray) -> np.ndarray:
    """Variances of values whose variance over all samples is 1; nan where they are constant."""
    return np.where(variance > _FLAT, variance, np.nan)
