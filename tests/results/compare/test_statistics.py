"""The statistics of comparisons against brute force: metrics on each resample, enumeration, other tests."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from trainer.answers.metrics import compute, metric_of
from trainer.results.compare.statistics import (
    corrected,
    estimate,
    mcnemar,
    over_seeds,
    resample_counts,
)
from trainer.tasks import get_task

TASKS = ("meld", "mosei", "simsv2")


def answers(name: str, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truths and predictions better than chance, some on the classes' edges, some invalid."""
    task, rng = get_task(name), np.random.default_rng(seed)
    if task.kind == "classification":
        truth = rng.choice(len(task.labels), samples, p=[0.4, 0.2, 0.2, 0.1, 0.06, 0.04, 0.0]).astype(float)
        guess = np.where(rng.random(samples) < 0.5, truth, rng.integers(0, 6, samples))
    else:
        assert task.grid is not None
        truth = rng.choice(np.array(task.grid.values), samples)
        guess = np.round(truth + rng.normal(0, 0.5, samples), int(rng.integers(1, 3)))
    guess[rng.random(samples) < 0.05] = np.nan
    return truth, guess


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_from_sums_is_the_published_one(name: str) -> None:
    task = get_task(name)
    truth, guess = answers(name, 300)
    cases = {
        "usual": (truth, guess),
        "one sample": (truth[:1], truth[:1]),
        "all invalid": (truth, np.full(300, np.nan)),
        "constant": (truth, np.full(300, 1.0)),
        "one truth": (np.full(300, 1.0), guess),
        "truths all 0": (np.zeros(300), guess),
    }
    for case, (t, g) in cases.items():
        expected = compute(task, t, g)
        for metric in task.metrics:
            of = metric_of(task, metric, t, g)
            got = float(of.weighted(np.ones((1, len(t))))[0])
            if expected[metric] is None:
                assert np.isnan(got), (case, metric)
            else:
                assert got == pytest.approx(expected[metric], abs=1e-12), (case, metric)


@pytest.mark.parametrize("name", TASKS)
def test_resampled_metrics_are_those_of_the_samples_drawn(name: str) -> None:
    task = get_task(name)
    truth, guess = answers(name, 60)
    counts_BN = resample_counts(60, 25, np.random.default_rng(1))
    assert (counts_BN.sum(1) == 60).all()
    assert 0.6 < (counts_BN > 0).mean() < 0.66  # 1 - 1/e
    for metric in task.metrics:
        got_B = metric_of(task, metric, truth, guess).weighted(counts_BN)
        for counts_N, got in zip(counts_BN, got_B, strict=True):
            drawn = np.repeat(np.arange(60), counts_N.astype(int))
            assert got == pytest.approx(compute(task, truth[drawn], guess[drawn])[metric], abs=1e-9), metric


def test_the_mean_over_seeds_is_students() -> None:
    values = np.array([0.6, 0.65, 0.61, 0.7])
    found = over_seeds(values, 0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    one = over_seeds(values[:1], 0.9)
    assert (one.mean, one.sd, one.low) == (0.6, None, None)
    assert over_seeds(np.array([0.6, np.nan]), 0.9).mean is None


def test_a_difference_with_the_variance_of_seeds_alone_is_the_paired_t_test() -> None:
    a, b = np.array([0.61, 0.64, 0.66]), np.array([0.60, 0.60, 0.65])
    found = estimate(a - b, np.full(100, (a - b).mean()), 1000, 0.95)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    far = estimate(a - b + 1e9, np.full(100, 1e9), 1000, 0.95)
    assert far.p is not None
    assert far.p > 0
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_difference_of_one_seed_is_the_paired_bootstrap_over_samples() -> None:
    rng = np.random.default_rng(2)
    change_N = rng.choice([-1, 0, 1], 400, p=[0.1, 0.7, 0.2])
    resampled_B = np.array([rng.choice(change_N, 400).mean() for _ in range(4000)])
    found = estimate(np.array([change_N.mean()]), resampled_B, 400, 0.95)
    assert found.se_seeds is None
    assert found.se_samples == pytest.approx(change_N.std() / 20, rel=0.05)
    assert (found.low, found.high) == pytest.approx(np.quantile(resampled_B, [0.025, 0.975]), abs=0.004)
    assert found.p == pytest.approx(stats.ttest_1samp(change_N, 0).pvalue, rel=0.5)


def test_what_is_undefined_is_not_estimated() -> None:
    some = np.full(100, 0.1)
    assert estimate(np.array([]), some, 10, 0.95).value is None
    assert estimate(np.array([0.1, np.nan]), some, 10, 0.95).value is None
    often = estimate(np.array([0.1]), np.where(np.arange(100) % 10, 0.1, np.nan), 10, 0.95)
    assert (often.value, often.low, often.p) == (0.1, None, None)
    same = estimate(np.zeros(3), np.zeros(100), 10, 0.95)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_mcnemar_of_one_seed_is_the_exact_binomial_test() -> None:
    rng = np.random.default_rng(3)
    for share in (0.5, 0.6, 0.9):
        a, b = (rng.random((1, 200)) < share), (rng.random((1, 200)) < 0.5)
        gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
        assert mcnemar(a, b) == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert mcnemar(a, a) == 1


def test_mcnemar_of_several_seeds_counts_every_exchange_of_samples() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 10)) < 0.8, rng.random((3, 10)) < 0.5
    change_N = a.sum(0) - b.sum(0)
    sums = [
        abs(sum(s * c for s, c in zip(signs, change_N, strict=True))) for signs in itertools.product((-1, 1), repeat=10)
    ]
    assert mcnemar(a, b) == pytest.approx(np.mean(np.array(sums) >= abs(change_N.sum())))


def test_seeds_that_agree_are_no_more_evidence_than_one() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random((1, 300)) < 0.7, rng.random((1, 300)) < 0.6
    assert mcnemar(np.repeat(a, 5, 0), np.repeat(b, 5, 0)) == pytest.approx(mcnemar(a, b))


def test_corrections_by_hand() -> None:
    p = [0.01, None, 0.04, 0.03, 0.005]
    assert corrected(p, "holm") == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert corrected(p, "bh") == pytest.approx([0.02, None, 0.04, 0.04, 0.02])
    assert corrected(p, "none") == p
    assert corrected([0.8, 0.9], "holm") == [1.0, 1.0]
    assert corrected([None], "bh") == [None]


@pytest.mark.parametrize(
    ("seeds", "seed_effect"),
    [
        (3, 0.1),
        (5, 0.4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 0.1), (3, 0.4))),
    ],  # between those
)
def test_intervals_cover_where_simpler_ones_do_not(seeds: int, seed_effect: float) -> None:
    """Runs with effects of seeds and of samples, and no true difference: how often the 95 % interval holds 0."""
    rng = np.random.default_rng(6)
    samples, trials = 120, 1000
    held = {"ours": 0, "seeds resampled": 0, "Satterthwaite": 0}
    for _ in range(trials):
        seed_S1, sample_1N = rng.normal(0, seed_effect, (seeds, 1)), rng.normal(0, 0.7, (1, samples))
        change_SN = seed_S1 + sample_1N + rng.normal(0, 0.3, (seeds, samples))
        counts_BN = resample_counts(samples, 200, rng)
        resampled_BS = counts_BN @ change_SN.T / samples
        found = estimate(change_SN.mean(1), resampled_BS.mean(1), samples, 0.95)
        assert found.low is not None
        assert found.high is not None
        held["ours"] += found.low <= 0 <= found.high
        assert (found.p <= 0.05) == (not found.low <= 0 <= found.high)  # type: ignore[operator]
        drawn_BS = rng.integers(seeds, size=(200, seeds))
        low, high = np.quantile(np.take_along_axis(resampled_BS, drawn_BS, 1).mean(1), [0.025, 0.975])
        held["seeds resampled"] += low <= 0 <= high
        a, b = found.se_samples, found.se_seeds
        assert a is not None
        assert b is not None
        freedom = (a**2 + b**2) ** 2 / (a**4 / (samples - 1) + b**4 / (seeds - 1))
        held["Satterthwaite"] += abs(found.value or 0) <= stats.t.ppf(0.975, freedom) * np.hypot(a, b)
    print(f"{seeds} seeds of deviation {seed_effect}: {held} of {trials}")
    assert 945 <= held["ours"] <= 990
    assert held["seeds resampled"] < held["Satterthwaite"] <= held["ours"]
