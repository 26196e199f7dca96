"""The formulas of the metrics against scikit-learn and scipy, bit for bit, and what a table entry must hold."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    jaccard_score,
    mean_absolute_error,
    r2_score,
    recall_score,
    root_mean_squared_error,
)

from tests.distributed.processes import ROOT
from trainer import metric_formulas as formulas
from trainer import metric_table as table
from trainer.answers.metrics_page import render
from trainer.metric_formulas import INVALID
from trainer.metric_table import FAMILIES


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


def sets(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sets of up to 52 labels as numbers, empty ones among them, and invalid predictions."""
    samples, count = int(rng.integers(2, 200)), int(rng.choice([2, 6, 28, 52]))
    truth_NC = rng.random((samples, count)) < rng.random(count)
    guess_NC = np.where(rng.random((samples, count)) < 0.7, truth_NC, rng.random((samples, count)) < 0.3)
    truth, guess = (
        np.array([sum(2**i for i in np.flatnonzero(row).tolist()) for row in x], float) for x in (truth_NC, guess_NC)
    )
    return truth, np.where(rng.random(samples) < 0.1, INVALID, guess)


def members(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Indicator matrix of the labels that occur in `of`, and a last column for invalid predictions."""
    there = [i for i in range(52) if any(int(v) >> i & 1 for v in of.tolist() if v != INVALID)]
    return np.array(
        [[*(v != INVALID and int(v) >> i & 1 for i in there), v == INVALID] for v in values.tolist()], dtype=int
    )


def of_sets(score, columns: slice = slice(None), **how):
    def reference(truth: np.ndarray, guess: np.ndarray) -> float:
        both = np.concatenate([truth, guess])
        truth_NC, guess_NC = (members(values, both)[:, columns] for values in (truth, guess))
        if truth_NC.shape[1] == 1:  # which scikit-learn takes for two classes
            return score(truth_NC[:, 0], guess_NC[:, 0])
        return score(truth_NC, guess_NC, **how)

    return reference


def f1(average: str):
    def reference(truth: np.ndarray, guess: np.ndarray) -> float:
        there = sorted({*truth.tolist(), *guess.tolist()} - {INVALID})
        return f1_score(truth, guess, labels=there, average=average, zero_division=np.nan)

    return reference


def concordance(truth: np.ndarray, guess: np.ndarray) -> float:
    """Lin's own definition: 1 − E (t − p)² / the same of independent pairs, by brute force over all pairs."""
    if len(set(truth.astype(np.float32))) < 2:
        return math.nan
    return 1 - np.mean((truth - guess) ** 2) / np.mean((truth[:, None] - guess[None]) ** 2)


REFERENCES = {
    formulas.accuracy: (classes, accuracy_score),
    formulas.weighted_f1: (classes, f1("weighted")),
    formulas.macro_f1: (classes, f1("macro")),
    formulas.macro_recall: (classes, balanced_accuracy_score),
    formulas.mean_absolute_error: (numbers, mean_absolute_error),
    formulas.root_mean_squared_error: (numbers, root_mean_squared_error),
    formulas.pearson: (numbers, lambda t, p: pearsonr(t, p).statistic),
    formulas.micro_f1_of_sets: (sets, of_sets(f1_score, average="micro")),
    formulas.macro_f1_of_sets: (sets, of_sets(f1_score, slice(-1), average="macro")),
    formulas.weighted_f1_of_sets: (sets, of_sets(f1_score, slice(-1), average="weighted")),
    formulas.jaccard: (sets, of_sets(jaccard_score, average="samples", zero_division=1)),
    formulas.set_accuracy: (sets, of_sets(accuracy_score)),
    formulas.r2: (numbers, lambda t, p: r2_score(t, p, force_finite=False)),
}


def test_every_formula_has_a_reference() -> None:
    used = {metric.formula for family in FAMILIES.values() for metric in family.metrics}
    assert used == {*REFERENCES, formulas.concordance}


@pytest.mark.parametrize(
    "seeds",
    [range(50), pytest.param(range(50, 200), marks=pytest.mark.slow)],  # more draws of the same
    ids=["few", "many"],
)
@pytest.mark.parametrize("formula", REFERENCES, ids=lambda formula: formula.__name__)
def test_a_formula_is_the_librarys_bit_for_bit_and_of_weights_the_samples_repeated(
    formula: formulas.Formula, seeds: range
) -> None:
    draw, reference = REFERENCES[formula]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        truth, guess = draw(rng)
        metric = table.Metric(
            "key", "name", "", formula, "", classes=table.label if draw is classes else None, sets=draw is sets
        )
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


@pytest.mark.parametrize("seed", range(100))
def test_concordance_is_lins_definition_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, guess = numbers(rng)
    of = table.REGRESSION.of("ccc", truth, guess)
    assert of.value() == pytest.approx(concordance(truth, guess), rel=1e-9, abs=1e-9, nan_ok=True)
    weight_N = rng.integers(0, 3, len(truth))
    rows = np.repeat(np.arange(len(truth)), weight_N)
    if len(set(truth[rows])) > 1:
        expected = concordance(truth[rows], guess[rows])
        assert of.weighted(weight_N[None])[0] == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_concordance_by_hand() -> None:
    def ccc(truth: list[float], guess: list[float]) -> float:
        return table.REGRESSION.of("ccc", np.array(truth), np.array(guess)).value()

    assert ccc([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    assert ccc([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert ccc([1, 2, 3], [2, 3, 4]) == pytest.approx(4 / 7)  # 2 · 2/3 / (2/3 + 2/3 + 1): r is 1, the mean is off by 1
    assert ccc([1, 2, 3], [2, 2, 2]) == 0  # constant predictions agree in nothing, and have no correlation
    assert np.isnan(ccc([2, 2, 2], [1, 2, 3]))
    assert np.isnan(ccc([2], [1]))
    far = 1e6 + np.array([1.0, 2.0, 3.0])  # no digits are lost far from 0
    assert ccc(list(far), list(far + 1)) == pytest.approx(4 / 7, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_uar_is_the_mean_recall_over_the_classes_of_the_truth(seed: int) -> None:
    """Also where a class is in the prediction only, where invalid answers are, and in resamples that lose a class."""
    rng = np.random.default_rng(seed)
    truth, guess = rng.choice([0, 1, 2, 4], 40, p=[0.7, 0.1, 0.1, 0.1]), rng.integers(0, 6, 40)
    invalid_N = rng.random(40) < 0.1
    of = table.EMOTION.of("uar", truth.astype(float), np.where(invalid_N, np.nan, guess))
    scored = np.where(invalid_N, INVALID, guess)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert of.value() == balanced_accuracy_score(truth, scored)
    assert of.value() == recall_score(truth, scored, labels=np.unique(truth), average="macro")
    for row in rng.multinomial(8, np.full(40, 1 / 40), size=50):
        drawn = np.repeat(np.arange(40), row)
        expected = recall_score(truth[drawn], scored[drawn], labels=np.unique(truth[drawn]), average="macro")
        assert of.weighted(row[None])[0] == pytest.approx(expected, abs=1e-12)


def test_an_entry_says_what_it_is_and_a_family_what_it_selects_by() -> None:
    for family in FAMILIES.values():
        keys = [metric.key for metric in family.metrics]
        assert len(set(keys)) == len(keys)
        assert family.select in keys
        assert all(metric.name and metric.definition and metric.source for metric in family.metrics)
        assert {metric.key for metric in family.metrics if not metric.greater_is_better} <= {"mae", "rmse"}
        aliases = [alias for metric in family.metrics for alias in metric.aliases]
        assert len({*keys, *aliases}) == len(keys) + len(aliases) == len(family.names)


def test_the_page_shows_the_table_as_it_is() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert page == render(page), "run: python -m trainer.answers.metrics_page docs/metrics.md"
    for family in FAMILIES.values():
        for metric in family.metrics:
            assert f"| `{metric.key}` | {metric.name} | " in page
