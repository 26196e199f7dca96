"""How many seeds would tell a difference of the observed size, by the test that a comparison uses.

The test is that of :mod:`trainer.results.compare.statistics`: a difference d over S seeds is significant at level α where
``|d| >= h``, ``h² = (t_{N-1} se_samples)² + (t_{S-1} sd / √S)²`` with two-sided quantiles t at α. Power is its probability to be
significant when new seeds are drawn on the same samples: ``d ~ N(δ, σ²/S)`` and, independent of it, ``sd² ~ σ² χ²_{S-1} / (S-1)``,
with the observed difference as δ and the observed deviation over seeds as σ. `se_samples` stays as it is, since seeds do not
add samples. Source: Cohen 1988, ch. 2 (power of the t test), with the part of the samples added.

Apart from that, a sign-flip test of S differences (Fisher 1935) has 2^S equally probable outcomes, so its two-sided p is never
below ``2 / 2^S``, however large the differences are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats

POWER = 0.8
MOST = 1000  # seeds beyond which no number is given
_QUANTILES = (np.arange(400) + 0.5) / 400

Limit = Literal["one seed", "no difference", "samples", "folds", "many seeds"]


@dataclass(frozen=True)
class SeedsNeeded:
    """`seeds`, or why no number of seeds is given.

    `limit`: "one seed" gives no deviation; "no difference" was observed; "samples" or "folds" make the interval wider than the
    difference, however many seeds there are; "many seeds" are more than :data:`MOST`.
    """

    seeds: int | None
    limit: Limit | None = None


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p that a sign-flip test over so many seeds can give: ``2 / 2^S``, 1 for one seed."""
    return 2.0 ** (1 - seeds)


def seeds_to_reach(level: float) -> int:
    """The fewest seeds for which :func:`smallest_p` is at most `level`."""
    return max(1, math.ceil(1 - math.log2(level) - 1e-9))


def power(
    difference: float, sd: float, seeds: int, *, se_samples: float, samples: int, level: float, width: float = 0.0
) -> float:
    """The probability that the test over so many seeds (two or more) is significant.

    Args:
        difference, sd: δ and σ, the mean and the standard deviation over seeds.
        se_samples, samples: the standard error from the samples, and their number.
        level: α, after correction for the number of tests.
        width: half an interval that must not hold 0 either, such as that over folds.
    """
    variance_Q = _chi2_quantiles(seeds - 1) / (seeds - 1) * sd**2 / seeds
    fixed = stats.t.isf(level / 2, max(samples - 1, 1)) * se_samples
    half_Q = np.maximum(np.sqrt(fixed**2 + stats.t.isf(level / 2, seeds - 1) ** 2 * variance_Q), width)
    error = sd / math.sqrt(seeds)
    if error == 0:
        return float(np.mean(abs(difference) >= half_Q))
    return float(
        np.mean(stats.norm.sf(half_Q, abs(difference), error) + stats.norm.cdf(-half_Q, abs(difference), error))
    )


@lru_cache(maxsize=64)
def _chi2_quantiles(freedom: int) -> np.ndarray:
    """[Q]: the middles of equally probable parts of the distribution."""
    return np.asarray(stats.chi2.ppf(_QUANTILES, freedom))


def seeds_needed(
    difference: float,
    sd: float | None,
    *,
    se_samples: float,
    samples: int,
    level: float,
    width: float = 0.0,
    target: float = POWER,
) -> SeedsNeeded:
    """The fewest seeds with which :func:`power` reaches `target`; see there for the arguments. `sd` is None for one seed."""
    if difference == 0:
        return SeedsNeeded(None, "no difference")
    if abs(difference) <= width:
        return SeedsNeeded(None, "folds")
    if abs(difference) <= stats.t.isf(level / 2, max(samples - 1, 1)) * se_samples:
        return SeedsNeeded(None, "samples")
    if sd is None:
        return SeedsNeeded(None, "one seed")

    def enough(seeds: int) -> bool:
        reached = power(difference, sd, seeds, se_samples=se_samples, samples=samples, level=level, width=width)
        return reached >= target

    high = 2
    while not enough(high):
        if high == MOST:
            return SeedsNeeded(None, "many seeds")
        high = min(2 * high, MOST)
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return SeedsNeeded(high)
