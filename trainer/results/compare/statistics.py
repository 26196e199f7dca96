"""The statistics of a comparison: resampled samples, intervals, paired tests, correction for many tests.

Legend: N samples, B resamples, S seeds. Undefined is nan in arrays and None elsewhere, never 0.

What is estimated. Two trainings differ by their seed, and a test set is one sample of its population. Let
``d_s`` be the difference of a metric between two groups at seed s, on all samples. The estimate is ``d``, the mean of
``d_s``, for the difference that new seeds *and* new samples would show on average. Its variance has two parts:

- samples: the variance of ``d`` when ids are resampled with replacement, the same ids for all runs of both groups (so
  pairs stay pairs, and what all seeds get wrong together counts as one sample), the seeds as they are;
- seeds: ``sd(d_s)² / S``.

Each has its own interval (Student's t with N-1 and S-1 degrees of freedom); the half-widths are added as squares, and p is
the level at which the interval ends at 0. With one seed it is the paired bootstrap over samples; where samples do not
vary it is the paired t-test over seeds. Two simpler methods were dropped, since their coverage is below their level
(`tests/results/compare/test_statistics.py` measures it): resampling the seeds with replacement too, of which there are three or
five; and one t interval from the summed variance with Satterthwaite's degrees of freedom.

Over folds of a cross-validation the metric is that of all folds' predictions together, so that each sample counts once, and
samples are drawn within their folds. Between two folds models differ by their training data too, and their training data overlap:
the variance over folds is too small for the mean, and no unbiased estimate of it exists (Bengio & Grandvalet 2004). With F folds,
``sd(d_f)² / F`` is therefore replaced by ``sd(d_f)² (1/F + n_test/n_train)`` (Nadeau & Bengio 2003), with F-1 degrees of freedom.
Of that interval and the one above the wider counts, and of their p the larger.

Sources: Bouthillier et al. 2021 (both parts of the variance, pairing by seed); Dror et al. 2018 (paired bootstrap,
McNemar); Nadeau & Bengio 2003 (folds); Owen 2007 (crossed seeds and samples); Efron & Tibshirani 1993, ch. 6 and 12; Zou & Donner 2008 (adding the
half-widths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

Correction = Literal["holm", "bh", "none"]
DEFINED = 0.95  # share of the resamples in which a metric must be defined


def resample_counts(
    samples: int, resamples: int, rng: np.random.Generator, fold_N: np.ndarray | None = None
) -> np.ndarray:
    """[B, N]: how often each sample is drawn in each resample of `samples` draws with replacement.

    With `fold_N`, the fold of each sample, as many are drawn within each fold as it has.
    """
    if fold_N is not None:
        counts_BN = np.zeros((resamples, samples), dtype=np.float32)
        for fold in np.unique(fold_N):
            members = np.flatnonzero(fold_N == fold)
            counts_BN[:, members] = resample_counts(len(members), resamples, rng)
        return counts_BN
    drawn_BN = rng.integers(samples, size=(resamples, samples))
    drawn_BN += np.arange(resamples)[:, None] * samples
    return np.bincount(drawn_BN.ravel(), minlength=resamples * samples).reshape(resamples, samples).astype(np.float32)


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over seeds, its sample standard deviation and t interval; None where undefined."""

    mean: float | None
    sd: float | None
    low: float | None
    high: float | None


def over_seeds(values_S: np.ndarray, level: float) -> Mean:
    """Mean over seeds; undefined if any seed is, since leaving seeds out would be a selection."""
    count = len(values_S)
    if not count or np.isnan(values_S).any():
        return Mean(None, None, None, None)
    mean = float(values_S.mean())
    if count == 1:
        return Mean(mean, None, None, None)
    sd = float(values_S.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * sd / np.sqrt(count)
    return Mean(mean, sd, mean - half, mean + half)


def over_folds(values_F: np.ndarray, ratio: float, level: float) -> Mean:
    """The mean over the folds of a cross-validation, their standard deviation and Nadeau & Bengio's corrected t interval.

    Args:
        values_F: the metric on each fold.
        ratio: samples tested over samples trained on, in a fold.
    """
    count = len(values_F)
    plain = over_seeds(values_F, level)
    if plain.mean is None or plain.sd is None:
        return plain
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * plain.sd * float(np.sqrt(1 / count + ratio))
    return Mean(plain.mean, plain.sd, plain.mean - half, plain.mean + half)


@dataclass(frozen=True)
class FoldTest:
    """The standard error of a difference over folds, and the p of Nadeau & Bengio's corrected t test."""

    se: float
    p: float
    freedom: int

    def half_width(self, level: float) -> float:
        """Half of the interval of confidence `level`."""
        return float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.se


def fold_test(value: float, differences_F: np.ndarray, ratio: float) -> FoldTest | None:
    """Whether `value`, the difference on all folds together, is more than its spread over folds; None where undefined.

    Args:
        differences_F: the difference on each fold, two or more.
        ratio: samples tested over samples trained on, in a fold.
    """
    if len(differences_F) < 2 or np.isnan(differences_F).any():
        return None
    freedom = len(differences_F) - 1
    se = float(differences_F.std(ddof=1) * np.sqrt(1 / len(differences_F) + ratio))
    if se == 0:
        return FoldTest(0.0, 1.0 if value == 0 else 0.0, freedom)
    return FoldTest(se, float(2 * stats.t.sf(abs(value) / se, freedom)), freedom)


@dataclass(frozen=True)
class Estimate:
    """A difference `value`, its standard errors from samples and seeds, its interval and two-sided p; see the module."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    se_samples: float | None = None
    se_seeds: float | None = None  # None with one seed, which gives no variance


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
    """Half the width of the interval of level ``1 - p``; each of `parts` is (standard error, degrees of freedom)."""
    return float(np.sqrt(sum((stats.t.isf(p / 2, max(n, 1)) * se) ** 2 for se, n in parts)))


def _p(parts: Sequence[tuple[float, int]], distance: float) -> float:
    """The p at which :func:`_half_width` equals `distance`; at least e^-280."""
    smallest = -280.0
    if _half_width(parts, np.exp(smallest)) < distance:
        return float(np.exp(smallest))
    return float(np.exp(optimize.brentq(lambda log_p: _half_width(parts, np.exp(log_p)) - distance, smallest, 0.0)))


def mcnemar(right_SN: np.ndarray, other_SN: np.ndarray) -> float:
    """Exact two-sided McNemar test of two groups' correct answers, paired by seed and sample, conditional on the models.

    Under the null hypothesis the two groups' answers to a sample are exchangeable, at all seeds together: the sum over
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
    """p-values corrected for multiple tests: Holm (family-wise error), Benjamini-Hochberg (false discovery rate), or not.

    None is not a test: it stays None and does not count. Sources: Holm 1979; Benjamini & Hochberg 1995.
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
