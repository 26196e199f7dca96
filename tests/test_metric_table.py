"""The formulas of the metrics against scikit-learn and scipy, bit for bit, and what a table entry must hold."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from tests.distributed.processes import ROOT
from trainer import metric_table as table
from trainer.answers.metrics_page import render
from trainer.metric_table import FAMILIES, INVALID


def classes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Up to twelve classes, some of them absent, and invalid predictions."""
    samples, count = int(rng.integers(1, 400)), int(rng.integers(2, 13))
    truth = rng.choice(count, samples, p=rng.dirichlet(np.full(count, 0.5)))
    guess = np.where(rng.random(samples) < 0.5, truth, rng.integers(0, count, samples))
    return truth, np.where(rng.random(samples) < 0.1, INVALID, guess)


def numbers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    samples = int(rng.integers(2, 400))
    truth = np.round(rng.uniform(-3, 3, samples), int(rng.integers(1, 4)))
    return truth + rng.choice([0.0, 10.0]), truth * rng.normal() + rng.normal(0, rng.choice([1e-6, 0.5, 3.0]), samples)


def f1(average: str):
    def reference(truth: np.ndarray, guess: np.ndarray) -> float:
        there = sorted({*truth.tolist(), *guess.tolist()} - {INVALID})
        return f1_score(truth, guess, labels=there, average=average, zero_division=np.nan)

    return reference


REFERENCES = {
    table.accuracy: (classes, accuracy_score),
    table.weighted_f1: (classes, f1("weighted")),
    table.macro_f1: (classes, f1("macro")),
    table.mean_absolute_error: (numbers, mean_absolute_error),
    table.pearson: (numbers, lambda t, p: pearsonr(t, p).statistic),
    table.r2: (numbers, lambda t, p: r2_score(t, p, force_finite=False)),
}


def test_every_formula_has_a_reference() -> None:
    used = {metric.formula for family in FAMILIES.values() for metric in family.metrics}
    assert used == set(REFERENCES)


@pytest.mark.parametrize("formula", REFERENCES, ids=lambda formula: formula.__name__)
def test_a_formula_is_the_librarys_bit_for_bit_and_of_weights_the_samples_repeated(formula: table.Formula) -> None:
    draw, reference = REFERENCES[formula]
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth, guess = draw(rng)
        metric = table.Metric("key", "name", "", formula, "", classes=table.label if draw is classes else None)
        of = metric.of(*(np.where(x == INVALID, np.nan, x).astype(float) for x in (truth, guess)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(of.value(), reference(truth, guess), equal_nan=True)
            weight_N = rng.integers(0, 3, len(truth))
            chosen_N = rng.random(len(truth)) < 0.8
            rows = np.repeat(np.arange(len(truth)), weight_N * chosen_N)
            if len(set(truth[rows])) < 2 or len(set(guess[rows])) < 2:
                continue
            expected = reference(truth[rows], guess[rows])
        got = of.weighted(weight_N[None, chosen_N], chosen_N)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert of.value(chosen_N) == pytest.approx(reference(truth[chosen_N], guess[chosen_N]), rel=1e-9, abs=1e-9)


def test_an_entry_says_what_it_is_and_a_family_what_it_selects_by() -> None:
    for family in FAMILIES.values():
        keys = [metric.key for metric in family.metrics]
        assert len(set(keys)) == len(keys)
        assert family.select in keys
        assert all(metric.name and metric.definition and metric.source for metric in family.metrics)
        assert {metric.key for metric in family.metrics if not metric.greater_is_better} <= {"mae"}


def test_the_page_shows_the_table_as_it_is() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert page == render(page), "run: python -m trainer.answers.metrics_page docs/metrics.md"
    for family in FAMILIES.values():
        for metric in family.metrics:
            assert f"| `{metric.key}` | {metric.name} | " in page
