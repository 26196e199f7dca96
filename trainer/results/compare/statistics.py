"""The statistics of a comparison: metrics over resampled samples, intervals, paired tests, correction for many tests.

Legend: N samples, B resamples, S seeds, K columns. Undefined is nan in arrays and None elsewhere, never 0.

What is estimated. Two trainings differ by their seed, and a test set is one draw of the samples there could be. Let
``d_s`` be the difference of a metric between two groups at seed s, on all samples. The estimate is ``d``, the mean of
``d_s``, for the difference that new seeds *and* new samples would show on average. Its variance has two parts:

- samples: the variance of ``d`` when ids are resampled with replacement, the same ids for all runs of both groups (so
  pairs stay pairs, and what all seeds get wrong together counts as one sample), the seeds as they are;
- seeds: ``sd(d_s)² / S``.

Each has its own interval (Student's t with N-1 and S-1 degrees of freedom); the half-widths are added as squares, and p is
the level at which the interval ends at 0. With one seed it is the paired bootstrap over samples; where samples do not
vary it is the paired t-test over seeds. Two simpler ways were left, since they miss the truth more often than they say
(`tests/results/compare/test_statistics.py` measures all): resampling the seeds with replacement too, of which there are three or
five; and one t interval from the summed variance with Satterthwaite's degrees of freedom.

Sources: Bouthillier et al. 2021 (both parts of the variance, pairing by seed); Dror et al. 2018 (paired bootstrap,
McNemar); Owen 2007 (crossed seeds and samples); Efron & Tibshirani 1993, ch. 6 and 12; Zou & Donner 2008 (adding the
half-widths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from trainer.answers.metrics import Formula, Ingredients

Correction = Literal["holm", "bh", "none"]
DEFINED = 0.95  # share of the resamples in which a metric must be defined
_FLAT = 1e-12  # variance, of columns scaled to variance 1, below which they are constant


def resample_counts(samples: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[B, N]: how often each sample is drawn in each resample of `samples` draws with replacement."""
    drawn_BN = rng.integers(samples, size=(resamples, samples))
    drawn_BN += np.arange(resamples)[:, None] * samples
    return np.bincount(drawn_BN.ravel(), minlength=resamples * samples).reshape(resamples, samples).astype(np.float32)


def columns(of: Ingredients) -> np.ndarray:
    """[N, K]: what `of`'s formula needs of each sample, 0 where it does not count: :func:`value` takes their sums."""
    truth_N, guess_N, counted_N = of.truth_N, of.guess_N, of.counted_N
    if of.formula == "accuracy":
        parts = [np.ones(len(truth_N)), truth_N == guess_N]
    elif of.formula in ("weighted F1", "macro F1"):
        classes = np.arange(of.classes)
        truth_NC, guess_NC = truth_N[:, None] == classes, guess_N[:, None] == classes
        parts = [*truth_NC.T, *guess_NC.T, *(truth_NC & guess_NC).T]
    else:
        parts = _moments(of)
    return np.stack([np.where(counted_N, part, 0.0) for part in parts], axis=1)


def _moments(of: Ingredients) -> list[np.ndarray]:
    one_N = np.ones(len(of.truth_N))
    if of.formula == "MAE":
        return [one_N, np.abs(of.truth_N - of.guess_N)]
    t_N, scale = _standard(of.truth_N, of.counted_N)
    if of.formula == "R2":
        return [one_N, t_N, t_N**2, ((of.truth_N - of.guess_N) * scale) ** 2]
    g_N, _ = _standard(of.guess_N, of.counted_N)
    return [one_N, t_N, g_N, t_N**2, g_N**2, t_N * g_N]


def _standard(values_N: np.ndarray, counted_N: np.ndarray) -> tuple[np.ndarray, float]:
    """The values with mean 0 and variance 1, and by what they were multiplied; all 0 where float32 sees one value."""
    used = values_N[counted_N]
    if len(np.unique(used.astype(np.float32))) < 2:
        return np.zeros(len(values_N)), 0.0
    scale = 1.0 / float(used.std())
    return (values_N - used.mean()) * scale, scale


def value(formula: Formula, sums: np.ndarray) -> np.ndarray:
    """The metric from the sums of its :func:`columns` over samples (the last axis of `sums` is K); nan where undefined.

    With each sample once it is what :func:`trainer.answers.metrics.compute` says.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if formula in ("accuracy", "MAE"):
            return np.asarray(sums[..., 1] / sums[..., 0])
        if formula in ("weighted F1", "macro F1"):
            truth, guess, both = np.split(sums.astype(np.float64), 3, axis=-1)
            f1 = 2 * both / (truth + guess)  # nan: a class in neither, left out
            weight = truth if formula == "weighted F1" else (truth + guess > 0).astype(float)
            return np.asarray(np.where(weight > 0, f1 * weight, 0.0).sum(-1) / weight.sum(-1))
        mean = sums[..., 1:] / sums[..., :1]
        if formula == "R2":
            variance = _positive(mean[..., 1] - mean[..., 0] ** 2)
            return np.asarray(1 - mean[..., 2] / variance)
        t, g, tt, gg, tg = np.moveaxis(mean, -1, 0)
        spread = _positive(tt - t**2) * _positive(gg - g**2)
        return np.asarray(np.clip((tg - t * g) / np.sqrt(spread), -1, 1))


def _positive(variance: np.ndarray) -> np.ndarray:
    return np.where(variance > _FLAT, variance, np.nan)


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over seeds, its sample standard deviation and t interval; None where undefined."""

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def over_seeds(values_S: np.ndarray, level: float) -> Mean:
    """Mean over seeds. A seed at which the metric is undefined makes the mean so: leaving it out would flatter."""
    count = len(values_S)
    if not count or np.isnan(values_S).any():
        return Mean(None, None, None, None)
    mean = float(values_S.mean())
    if count == 1:
        return Mean(mean, None, None, None)
    sd = float(values_S.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * sd / np.sqrt(count)
    return Mean(mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class Estimate:
    """A difference `value`, its standard errors from samples and seeds, its interval and two-sided p; see the module."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    se_samples: float | None = None
    se_seeds: float | None = None  # None: one seed, whose variance cannot be known


def estimate(differences_S: np.ndarray, resampled_B: np.ndarray, samples: int, level: float) -> Estimate:
    """The mean difference with interval and p-value.

    Args:
        differences_S: the difference at each seed, on all samples.
        resampled_B: the mean difference over the same seeds, on each resample of the samples.
        samples: how many samples there are.
    """
    seeds = len(differences_S)
    if not seeds or np.isnan(differences_S).any():
        return Estimate(None)
    value = float(differences_S.mean())
    defined_B = resampled_B[np.isfinite(resampled_B)]
    if len(defined_B) < max(2, DEFINED * len(resampled_B)):
        return Estimate(value)
    se_samples = float(defined_B.std(ddof=1))
    se_seeds = float(differences_S.std(ddof=1) / np.sqrt(seeds)) if seeds > 1 else None
    parts = [(se_samples, samples - 1), *([(se_seeds, seeds - 1)] if se_seeds is not None else [])]
    if not any(se for se, _ in parts):  # the same answers in both groups
        return Estimate(value, value, value, 1.0 if value == 0 else None, se_samples, se_seeds)
    half = _half_width(parts, 1 - level)
    return Estimate(value, value - half, value + half, _p(parts, abs(value)), se_samples, se_seeds)


def _half_width(parts: Sequence[tuple[float, int]], p: float) -> float:
    """Of the interval of level ``1 - p`` of a value whose variance has `parts`: (standard error, degrees of freedom) each."""
    return float(np.sqrt(sum((stats.t.isf(p / 2, max(n, 1)) * se) ** 2 for se, n in parts)))


def _p(parts: Sequence[tuple[float, int]], distance: float) -> float:
    """The p at which :func:`_half_width` is `distance`; at least e^-280."""
    smallest = -280.0
    if _half_width(parts, np.exp(smallest)) < distance:
        return float(np.exp(smallest))
    return float(np.exp(optimize.brentq(lambda log_p: _half_width(parts, np.exp(log_p)) - distance, smallest, 0.0)))


def mcnemar(right_SN: np.ndarray, other_SN: np.ndarray) -> float:
    """Exact two-sided McNemar test of two groups' right answers, paired by seed and sample; the trained models are given.

    Under the null hypothesis the two groups' answers to a sample could be exchanged, at all seeds together: the sum over
    samples of ``d_n = Σ_s right_sn - other_sn`` then has random signs. Its distribution is computed exactly, as a
    convolution of binomials. With one seed this is McNemar's exact test (McNemar 1947). With several it is the exact form
    of the test for clustered pairs (Durkalski et al. 2003): summing the seeds' tables, as if their answers to one sample
    were independent, would make p too small.
    """
    change_N = right_SN.astype(int).sum(0) - other_SN.astype(int).sum(0)
    numbers = np.bincount(np.abs(change_N))
    chance = np.ones(1)  # of Σ k · X_k, where X_k ~ Binomial(number of samples that change by k, 1/2) change upwards
    for k, number in enumerate(numbers):
        if k and number:
            steps = np.zeros(k * number + 1)
            steps[::k] = stats.binom.pmf(np.arange(number + 1), number, 0.5)
            chance = np.convolve(chance, steps)
    total = len(chance) - 1
    sums = 2 * np.arange(total + 1) - total
    return float(min(1.0, chance[np.abs(sums) >= abs(int(change_N.sum()))].sum()))


def corrected(p_values: Sequence[float | None], method: Correction) -> list[float | None]:
    """p-values corrected for their number: Holm (any of them wrong), Benjamini-Hochberg (share of wrong ones), or not.

    What is None is no test: it stays None and does not count. Sources: Holm 1979; Benjamini & Hochberg 1995.
    """
    places = [i for i, p in enumerate(p_values) if p is not None]
    p_M = np.array([p_values[i] for i in places], dtype=float)
    if method == "bh" and len(p_M):
        p_M = stats.false_discovery_control(p_M, method="bh")
    elif method == "holm" and len(p_M):
        order = np.argsort(p_M, kind="stable")
        stepped = np.maximum.accumulate(p_M[order] * np.arange(len(p_M), 0, -1))
        p_M[order] = np.minimum(stepped, 1.0)
    out: list[float | None] = [None] * len(p_values)
    for place, p in zip(places, p_M.tolist(), strict=True):
        out[place] = p
    return out
